"""What is logged beside the training's model: mirror images, a temperature, one size."""

from pathlib import Path

import keras
import numpy as np
import pytest

from har.inference.classifier import load_classifier, save_classifier
from har.inference.runtimes import RUNTIMES
from har.models.backbones import BACKBONES
from har.models.build import (
    build_last_blocks,
    build_model,
    split_backbone,
)
from har.models.served import build_float32_copy, build_served
from har.training.calibration import scale
from har.util.errors import UserError
from tests.fixtures import tiny_recipe

IMAGES = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("test_time", ["none", "mirror"])
def test_a_saved_model_averages_and_scales(
    runtime: str, temperature: float, test_time: str, tiny_backbone: None, tmp_path: Path
) -> None:
    keras.utils.set_random_seed(0)
    recipe = tiny_recipe("v5", test_time=test_time)
    model = build_model(recipe, 3)
    wanted = model(IMAGES).numpy()
    mirrored = model(np.ascontiguousarray(IMAGES[:, :, ::-1])).numpy()
    assert np.abs(wanted - mirrored).max() > 1e-4
    if test_time == "mirror":
        wanted = (wanted + mirrored) / 2
    served = build_served(model, recipe, temperature)
    save_classifier(tmp_path, served, ("a", "b", "c"), recipe, runtime)
    forward = load_classifier(tmp_path).forward
    for count in (1, 3, 5):
        np.testing.assert_allclose(
            forward(IMAGES[:count]), scale(wanted[:count], temperature), atol=1e-5
        )


def test_a_plain_model_is_served_as_it_is(tiny_backbone: None) -> None:
    recipe = tiny_recipe("v5")
    model = build_model(recipe, 3)
    assert build_served(model, recipe, 1.0) is model


def test_probabilities_of_zero_stay_numbers(tiny_backbone: None) -> None:
    recipe = tiny_recipe("v5")
    model = build_model(recipe, 3)
    model.get_layer("label").set_weights([np.zeros((8, 3)), np.array([200.0, -200.0, 0.0])])
    found = build_served(model, recipe, 2.0)(IMAGES).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "backbone", ["efficientnet-lite2", pytest.param("efficientnetb0", marks=pytest.mark.slow)]
)
def test_a_network_is_cut_at_its_last_stride(backbone: str) -> None:
    recipe = tiny_recipe(
        "v7", backbone=backbone, weights="random", image_size=64, evaluation_size=96
    )
    model = build_model(recipe, 3)
    before, after = split_backbone(model, recipe)
    learner = build_last_blocks(model, recipe, steps=1)
    for size in (64, 96):
        images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
        inner = before(images)
        assert inner.shape[1:3] == (size // 16, size // 16)
        np.testing.assert_allclose(learner(inner), model(images), atol=1e-6)
    strides = [s for layer in after.layers for s in getattr(layer, "strides", ())]
    assert strides.count(2) == 2
    trained = {id(weight) for weight in model.trainable_weights}
    assert trained == {id(weight) for weight in learner.trainable_weights}
    assert not any(isinstance(x, keras.layers.BatchNormalization) for x in after.layers)


def test_a_cut_may_be_named() -> None:
    recipe = tiny_recipe("v7", weights="random", evaluation_size=0, cut="blocks.14")
    names = [x.name for x in build_model(recipe, 3).layers[1].layers if x.trainable and x.weights]
    assert names[0] == "blocks.14.expand_conv"


@pytest.mark.parametrize("cut", ["blocks.16", "block", "nothing"])
def test_an_unknown_cut_lists_the_blocks(cut: str) -> None:
    recipe = tiny_recipe("v7", weights="random", cut=cut)
    with pytest.raises(UserError, match=rf"no block '{cut}'.* blocks\.0, .*blocks\.15"):
        build_model(recipe, 3)


def test_every_backbone_names_its_cut() -> None:
    assert all(backbone.cut for backbone in BACKBONES.values())


def test_a_model_of_any_size_is_served_at_one(tiny_backbone: None) -> None:
    recipe = tiny_recipe("v7")
    model = build_model(recipe, 3)
    copy = build_float32_copy(model, recipe, 3)
    assert copy.input_shape == (None, 40, 40, 3)
    images = np.random.default_rng(0).uniform(0, 255, (2, 40, 40, 3)).astype(np.float32)
    np.testing.assert_allclose(copy(images), model(images), atol=1e-6)
