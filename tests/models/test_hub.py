"""DINOv2, SigLIP 2 and ViT: KerasHub's networks, from its files, in layers of Keras."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from har.models import backbones
from har.models.backbones import build_backbone, check_weights_reader
from har.models.build import build_model
from har.models.devices import STRATEGIES
from har.models.hub import HUB_NETWORKS, HubNetwork
from har.models.merging import fold_batch_norms
from har.models.served import build_float32_copy
from har.recipe import PATCH_SIZES
from har.util.errors import UserError
from tests.fixtures import tiny_recipe

# One of each family, and the registers; the others differ in their measures alone.
KINDS = ("dinov2-small", "dinov2-small-registers", "siglip2-base", "vit-base")


@pytest.fixture
def hub() -> Any:
    """KerasHub's models."""
    reason = "KerasHub is not installed: pip install 'keras-hub>=0.32,<0.33'"
    return pytest.importorskip("keras_hub", reason=reason).models


def make_tiny(name: str) -> HubNetwork:
    """The same network with two narrow blocks, for images of four patches' height."""
    kind = HUB_NETWORKS[name].kind
    tiny = replace(kind, depth=2, width=24, heads=2, mlp=48, image_size=4 * kind.patch)
    return replace(HUB_NETWORKS[name], kind=tiny)


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backbone's name, which is that of a tiny network in the test."""
    monkeypatch.setitem(HUB_NETWORKS, request.param, make_tiny(request.param))
    return request.param


def build_in_keras_hub(hub: Any, name: str, image_size: int) -> keras.Model:
    """Build KerasHub's own network; that of SigLIP 2 with a text tower, as it is published."""
    kind = HUB_NETWORKS[name].kind
    common = {
        "image_shape": (image_size, image_size, 3),
        "patch_size": kind.patch,
        "num_layers": kind.depth,
        "num_heads": kind.heads,
        "hidden_dim": kind.width,
    }
    if name.startswith("vit"):
        return hub.ViTBackbone(mlp_dim=kind.mlp, **common)
    if name.startswith("siglip"):
        tower = hub.SigLIPVisionEncoder(intermediate_dim=kind.mlp, **common)
        text = {"hidden_dim": kind.width, "embedding_dim": kind.width, "vocabulary_size": 9}
        text |= {"num_layers": 1, "num_heads": 1, "intermediate_dim": 8, "max_sequence_length": 4}
        return hub.SigLIPBackbone(tower, hub.SigLIPTextEncoder(**text))
    registers = name.endswith("registers")
    return hub.DINOV2Backbone(
        intermediate_dim=kind.mlp,
        num_register_tokens=4 if registers else 0,
        antialias_in_interpolation=registers,
        position_embedding_shape=(kind.image_size, kind.image_size),
        **common,
    )


def publish(network: keras.Model, path: Path) -> Path:
    """Write a preset's weights file, in which every weight matters."""
    random = np.random.default_rng(0)
    for weight in network.weights:
        if weight.dtype == "float32":
            weight.assign(weight + random.normal(0, 0.1, weight.shape))
    network.save_weights(path)
    # DINOv2 keeps its positions twice, and reads those of the published size
    network.load_weights(path)
    return path


def compute_features(network: keras.Model, name: str, images: Any) -> Any:
    """Let KerasHub's network compute the features of pixels of 0..255."""
    if name.startswith("dinov2"):
        mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        tokens = np.asarray(network({"images": (images / 255 - mean) / deviation}))
        patches = tokens[:, 5 if name.endswith("registers") else 1 :]
        return np.concatenate([tokens[:, 0], patches.mean(axis=1)], axis=1)
    if name.startswith("vit"):
        return np.asarray(network(images / 127.5 - 1))[:, 0]
    return np.asarray(network.vision_encoder({"images": images / 127.5 - 1}))


def pictures(size: int) -> Any:
    return np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype(np.float32)


def recipe_of(name: str, **fields: Any) -> Any:
    return tiny_recipe(backbone=name, **{"image_size": 4 * PATCH_SIZES[name], **fields})


def build_on(weights: Path | str, name: str, image_size: int) -> keras.Model:
    return build_backbone(recipe_of(name, weights=str(weights), image_size=image_size))


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-4) -> None:
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


def test_a_published_file_gives_keras_hub_s_own_network(
    hub: Any, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 4 * PATCH_SIZES[tiny]
    theirs = build_in_keras_hub(hub, tiny, size)
    file = publish(theirs, tmp_path / "model.weights.h5")
    wanted = compute_features(theirs, tiny, pictures(size))
    assert_close(build_on(file, tiny, size)(pictures(size)), wanted)
    monkeypatch.setattr("kagglehub.model_download", lambda handle, path: str(file))
    assert_close(build_on("imagenet", tiny, size)(pictures(size)), wanted)


@pytest.mark.parametrize("tiny", KINDS[:2], indirect=True)
@pytest.mark.parametrize("patches", [3, 7])
def test_another_image_size_gives_what_keras_hub_interpolates(
    hub: Any, tiny: str, patches: int, tmp_path: Path
) -> None:
    size = patches * PATCH_SIZES[tiny]
    file = publish(build_in_keras_hub(hub, tiny, 4 * PATCH_SIZES[tiny]), tmp_path / "x.weights.h5")
    theirs = build_in_keras_hub(hub, tiny, size)
    theirs.load_weights(file)
    wanted = compute_features(theirs, tiny, pictures(size))
    assert_close(build_on(file, tiny, size)(pictures(size)), wanted, 1e-3)


@pytest.mark.parametrize("tiny", ["siglip2-base"], indirect=True)
def test_the_image_tower_alone_is_read_too(hub: Any, tiny: str, tmp_path: Path) -> None:
    theirs = build_in_keras_hub(hub, tiny, 64)
    file = publish(theirs.vision_encoder, tmp_path / "tower.weights.h5")
    wanted = compute_features(theirs, tiny, pictures(64))
    assert_close(build_on(file, tiny, 64)(pictures(64)), wanted)


# As KerasHub's list of presets has them; of SigLIP 2 it counts the text tower too.
PUBLISHED = {
    "dinov2-small": 22_582_656,
    "dinov2-base": 87_632_640,
    "dinov2-small-registers": 22_584_192,
    "dinov2-base-registers": 87_635_712,
    "vit-base": 85_798_656,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB_NETWORKS)
def test_the_measures_are_those_of_the_published_networks(
    hub: Any, name: str, tmp_path: Path
) -> None:
    kind = HUB_NETWORKS[name].kind
    theirs = build_in_keras_hub(hub, name, kind.image_size)
    preset = hub_preset(name)
    if name in PUBLISHED:
        assert theirs.count_params() == PUBLISHED[name] == preset["metadata"]["params"]
    assert preset["kaggle_handle"] == f"kaggle://{HUB_NETWORKS[name].handle}"
    file = publish(theirs, tmp_path / "model.weights.h5")
    size = 7 * kind.patch if name.startswith("dinov2") else kind.image_size
    if size != kind.image_size:
        theirs = build_in_keras_hub(hub, name, size)
        theirs.load_weights(file)
    wanted = compute_features(theirs, name, pictures(size))
    assert_close(build_on(file, name, size)(pictures(size)), wanted, 1e-3)


def hub_preset(name: str) -> Any:
    import keras_hub

    backbone = {
        "dinov2": keras_hub.models.DINOV2Backbone,
        "siglip": keras_hub.models.SigLIPBackbone,
        "vit": keras_hub.models.ViTBackbone,
    }[HUB_NETWORKS[name].family]
    return backbone.presets[HUB_NETWORKS[name].handle.split("/")[-2]]


def test_without_keras_hub_random_weights_train_and_serve(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    size = 5 * PATCH_SIZES[tiny]
    network = build_on("random", tiny, size)
    network.save(tmp_path / "model.keras")
    for copy in (keras.models.load_model(tmp_path / "model.keras"), fold_batch_norms(network)):
        np.testing.assert_array_equal(copy(pictures(size)), network(pictures(size)))


@pytest.mark.parametrize("tiny", ["dinov2-small-registers"], indirect=True)
def test_a_float32_copy_of_mixed_precision_is_the_same_network(tiny: str) -> None:
    recipe = recipe_of(tiny, weights="random", precision="mixed_bfloat16", strategy="mirrored")
    with STRATEGIES[recipe.strategy]().scope():
        model = build_model(recipe, 3)
    copy = build_float32_copy(model, recipe, 3)
    np.testing.assert_allclose(copy(pictures(56)), model(pictures(56)), atol=0.05)


@pytest.mark.parametrize("weights", ["imagenet", "model.weights.h5"])
def test_without_keras_hub_published_weights_name_what_to_install(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'keras-hub.*--weights random"):
        check_weights_reader(recipe_of("dinov2-small", weights=weights))
    check_weights_reader(recipe_of("dinov2-small", weights="random"))


def test_no_network_names_the_ways_out(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: str, path: str) -> str:
        raise ConnectionError("name resolution")

    monkeypatch.setattr("kagglehub.model_download", refuse)
    monkeypatch.setitem(HUB_NETWORKS, "vit-base", make_tiny("vit-base"))
    with pytest.raises(UserError) as caught:
        build_on("imagenet", "vit-base", 64)
    ways = ("name resolution", "--weights FILE", "efficientnet-lite0", "--weights random")
    assert all(each in str(caught.value) for each in ways)
    assert "kaggle.com/models/keras/vit/keras/vit_base_patch16_224_imagenet/4" in str(caught.value)


def test_a_foreign_file_is_named(hub: Any, tiny: str, tmp_path: Path) -> None:
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save_weights(
        tmp_path / "other.weights.h5"
    )
    (tmp_path / "text.weights.h5").write_text("not weights")
    with h5py.File(tmp_path / "large.weights.h5", "w") as file:
        file.create_dataset("layers/sig_lip_vision_encoder/x", (10**6, 10**6), chunks=(1, 1))
    for name in ("other", "text", "large"):
        with pytest.raises(UserError, match=rf"{name}.weights.h5 does not hold weights of {tiny}"):
            build_on(tmp_path / f"{name}.weights.h5", tiny, 5 * PATCH_SIZES[tiny])


def test_every_transformer_says_its_patches() -> None:
    assert {name: each.kind.patch for name, each in HUB_NETWORKS.items()} == PATCH_SIZES
    assert set(HUB_NETWORKS) <= set(backbones.BACKBONES)
