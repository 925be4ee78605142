"""Backbones, and where their weights come from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from keras.src.legacy.saving import legacy_h5_format

from har.models.backbones import BACKBONES, build_backbone, name_weights_by_content
from har.models.build import build_model
from har.models.efficientnet_lite import LITES
from har.models.served import build_float32_copy
from har.recipe import NATIVE_SIZES, digest_recipe
from har.util.errors import UserError
from tests.fixtures import tiny_recipe

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


def b0(weights: str):
    return tiny_recipe(backbone="efficientnetb0", image_size=64, weights=weights)


@pytest.fixture(
    scope="module", params=["b0.h5", pytest.param("b0.weights.h5", marks=pytest.mark.slow)]
)
def weights_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Keras publishes them (the old .h5 layout) and as it saves them today.

    The Normalization layer holds ImageNet's mean and, for a variance, standard deviation.
    """
    keras.utils.set_random_seed(0)
    network = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg"
    )
    (normalization,) = (x for x in network.layers if isinstance(x, layers.Normalization))
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    normalization.set_weights([mean, deviation, np.int64(0)])
    for layer in network.layers:  # random convolutions alone give features near zero
        if isinstance(layer, layers.BatchNormalization):
            gamma, *rest = layer.get_weights()
            layer.set_weights([gamma * 1.25, *rest])
    path = tmp_path_factory.mktemp("weights") / request.param
    network.save_weights(path) if "weights" in path.name else network.save(path)
    return path


@contextmanager
def downloaded(weights_file: Path) -> Iterator[None]:
    """Keras' download finds that file."""
    from keras.src.applications import efficientnet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet.file_utils, "get_file", lambda *a, **k: str(weights_file))
        yield


@pytest.fixture
def download(weights_file: Path) -> Iterator[None]:
    with downloaded(weights_file):
        yield


def keras_features(weights: str) -> np.ndarray:
    network = keras.applications.EfficientNetB0(
        include_top=False, weights=weights, input_shape=(64, 64, 3), pooling="avg"
    )
    return network(IMAGES).numpy()


@pytest.fixture(scope="module")
def keras_own(weights_file: Path) -> np.ndarray:
    """What Keras' own ImageNet network computes."""
    with downloaded(weights_file):
        return keras_features("imagenet")


@pytest.fixture(scope="module")
def features(weights_file: Path) -> np.ndarray:
    """What our network computes with `--weights FILE`."""
    return build_backbone(b0(str(weights_file)))(IMAGES, training=False).numpy()


def test_every_source_gives_keras_own_imagenet_network(
    download: None, keras_own: np.ndarray, features: np.ndarray
) -> None:
    scale = np.abs(keras_own).max()
    assert 1e-3 < scale < 1e3
    downloaded = build_backbone(b0("imagenet"))(IMAGES, training=False)
    for ours in (features, downloaded):
        np.testing.assert_allclose(ours, keras_own, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("weights_file", ["b0.h5"], indirect=True)
def test_keras_alone_reads_another_network_from_the_file(
    weights_file: Path, keras_own: np.ndarray
) -> None:
    naive = keras_features(str(weights_file))
    assert np.abs(naive - keras_own).max() > 0.1 * np.abs(keras_own).max()


# one layout is enough: both give one network
@pytest.mark.parametrize("weights_file", ["b0.h5"], indirect=True)
@pytest.mark.parametrize(
    "precision", [pytest.param("float32", marks=pytest.mark.slow), "mixed_bfloat16"]
)
def test_a_float32_copy_is_the_same_network(
    download: None, precision: str, features: np.ndarray
) -> None:
    """What is evaluated and served after training in mixed precision or on several devices."""
    recipe = replace(b0("imagenet"), precision=precision)
    model = build_model(recipe, 3)
    copy = build_float32_copy(model, recipe, 3)
    tolerance = 1e-6 if precision == "float32" else 0.02
    np.testing.assert_allclose(copy(IMAGES), model(IMAGES), atol=tolerance)
    np.testing.assert_allclose(copy.layers[1](IMAGES), features, atol=1e-5 * features.max())


def test_weights_files_are_told_apart_by_content(weights_file: Path, tmp_path: Path) -> None:
    elsewhere, other = tmp_path / "copy.h5", tmp_path / "other.h5"
    elsewhere.write_bytes(weights_file.read_bytes())
    other.write_bytes(weights_file.read_bytes() + b"x")
    first, same, differs = (
        digest_recipe(name_weights_by_content(b0(str(path))))
        for path in (weights_file, elsewhere, other)
    )
    assert first == same != differs
    assert name_weights_by_content(b0("imagenet")) == b0("imagenet")


@pytest.mark.parametrize("name", ["efficientnetb0", "efficientnet-lite0"])
def test_backbones_are_frozen_and_pooled(name: str) -> None:
    network = build_backbone(tiny_recipe(backbone=name, image_size=64, weights="random"))
    assert network.trainable_weights == []
    assert network.output_shape == (None, 1280)


def test_every_keras_backbone_is_known() -> None:
    older = [f"efficientnetb{n}" for n in range(8)]
    assert [name for name in BACKBONES if name not in LITES] == [*older, *NATIVE_SIZES]


# The smallest network of each newer family, and what Keras asks its users to do to the pixels.
NEWER = {
    "efficientnetv2-b0": ("EfficientNetV2B0", keras.applications.efficientnet_v2),
    "convnext-tiny": ("ConvNeXtTiny", keras.applications.convnext),
    "mobilenetv3-large": ("MobileNetV3Large", keras.applications.mobilenet_v3),
    "resnet50v2": ("ResNet50V2", keras.applications.resnet_v2),
}


# Of batch normalisation, by backbone: with more, rounding alone decides what a deep random network
# says; with less, its images do not.
SCALES = {"mobilenetv3-large": 3.0, "efficientnetv2-m": 0.94, "efficientnetv2-l": 0.87}


def spread(network: keras.Model, name: str) -> keras.Model:
    """Let every layer matter: a new ConvNeXt scales its blocks by a millionth, and a new batch
    normalisation is none.
    """
    random = np.random.default_rng(0)
    for layer in network.layers:
        if type(layer).__name__ == "LayerScale":
            layer.set_weights([random.uniform(0.5, 1, each.shape) for each in layer.get_weights()])
        elif isinstance(layer, layers.BatchNormalization):
            gamma, _beta, mean, variance = layer.get_weights()
            shift, mean = random.normal(0, 0.1, (2, *mean.shape))
            layer.set_weights([gamma * SCALES.get(name, 1.0), shift, mean, variance])
    return network


def save_published(network: keras.Model, path: Path) -> None:
    """As the files that Keras publishes: HDF5 with weights alone, in the order of the layers."""
    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, network)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "mobilenetv3-large" else pytest.mark.slow)
        for name in NEWER
    ],
)
def test_newer_networks_are_keras_own_on_pixels_of_0_to_255(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    keras.utils.set_random_seed(0)
    application, module = NEWER[name]
    network = getattr(keras.applications, application)(
        include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg"
    )
    spread(network, name)
    wanted = network(module.preprocess_input(IMAGES.copy()), training=False).numpy()
    assert np.abs(wanted).max() > 1e-6
    network.save_weights(saved := tmp_path / "saved.weights.h5")
    save_published(network, published := tmp_path / "published.h5")
    for weights in (str(saved), str(published), "imagenet"):
        with downloaded(published):
            ours = build_backbone(tiny_recipe(backbone=name, image_size=64, weights=weights))
        found = ours(IMAGES, training=False).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    # MobileNetV3 would warn that the size is not the one of its weights
    assert [each for each in recwarn if "input_shape" in str(each.message)] == []


def test_no_network_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from keras.src.applications import efficientnet

    def refuse(*args: object, **kwargs: object) -> None:
        raise Exception("URL fetch failure: name resolution")

    monkeypatch.setattr(efficientnet.file_utils, "get_file", refuse)
    with pytest.raises(UserError) as caught:
        build_backbone(b0("imagenet"))
    for way in ("name resolution", "--weights FILE", "efficientnet-lite0", "--weights random"):
        assert way in str(caught.value)


def test_missing_weights_file_is_named() -> None:
    with pytest.raises(UserError, match=r"no such weights file: nowhere.h5"):
        build_backbone(b0("nowhere.h5"))


def test_foreign_weights_file_is_named(tmp_path: Path) -> None:
    other = keras.Sequential([layers.Input((4,)), layers.Dense(3)])
    other.save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "text.h5").write_text("not weights")
    for name in ("other.weights.h5", "text.h5"):
        with pytest.raises(UserError, match=rf"{name} does not hold weights of"):
            build_backbone(b0(str(tmp_path / name)))
