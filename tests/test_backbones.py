"""Backbones, and where their weights come from."""

from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import tiny_recipe
from keras import layers

from har.backbones import BACKBONES, build_backbone
from har.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)


def b0(weights: str):
    return tiny_recipe(backbone="efficientnetb0", image_size=64, weights=weights)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as Keras publishes them: its Normalization holds ImageNet's mean and deviation."""
    network = keras.applications.EfficientNetB0(
        include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg"
    )
    (normalization,) = (x for x in network.layers if isinstance(x, layers.Normalization))
    mean, deviation = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    normalization.set_weights([mean, deviation, np.int64(0)])
    for layer in network.layers:  # random convolutions alone give features near zero
        if isinstance(layer, layers.BatchNormalization):
            gamma, *rest = layer.get_weights()
            layer.set_weights([gamma * 4, *rest])
    path = tmp_path_factory.mktemp("weights") / "b0.weights.h5"
    network.save_weights(path)
    return path


def test_weights_from_a_file_equal_keras_own_imagenet_network(
    weights_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keras.src.applications import efficientnet

    monkeypatch.setattr(efficientnet.file_utils, "get_file", lambda *a, **k: str(weights_file))
    keras_own = build_backbone(b0("imagenet"))(IMAGES, training=False).numpy()
    from_file = build_backbone(b0(str(weights_file)))(IMAGES, training=False).numpy()
    assert np.abs(keras_own).max() > 1e-2
    np.testing.assert_allclose(from_file, keras_own, rtol=1e-3, atol=1e-5)

    naive = keras.applications.EfficientNetB0(
        include_top=False, weights=str(weights_file), input_shape=(64, 64, 3), pooling="avg"
    )(IMAGES, training=False)
    assert np.abs(naive - keras_own).max() > 10 * np.abs(from_file - keras_own).max()


@pytest.mark.parametrize("name", ["efficientnetb0", "efficientnet-lite0"])
def test_backbones_are_frozen_and_pooled(name: str) -> None:
    network = build_backbone(tiny_recipe(backbone=name, image_size=64, weights="random"))
    assert network.trainable_weights == []
    assert network.output_shape == (None, 1280)


def test_every_keras_backbone_is_known() -> None:
    assert [name for name in BACKBONES if name != "efficientnet-lite0"] == [
        f"efficientnetb{n}" for n in range(8)
    ]


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
