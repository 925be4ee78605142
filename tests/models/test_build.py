"""Recipe to model: the notebooks' structure, to the parameter."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from har.models.build import HEADS, LOSSES, build_model
from har.models.served import build_float32_copy
from har.recipe import ORIGINAL
from tests.fixtures import TINY_SIZE, tiny_recipe


def test_original_on_b7_has_the_notebooks_parameters() -> None:
    model = build_model(replace(ORIGINAL, weights="random"), 15)
    backbone = model.layers[1]
    assert backbone.count_params() == 64_097_687
    assert backbone.get_layer("stem_conv").kernel.shape == (3, 3, 3, 64)
    assert model.count_params() == 65_416_614
    trainable = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert trainable == 1_318_927


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_heads_give_float32_probabilities(tiny_backbone: None, head: str, loss: str) -> None:
    recipe = tiny_recipe("v5", head=head, loss=loss)
    model = build_model(recipe, 3)
    probabilities = model(np.zeros((2, TINY_SIZE, TINY_SIZE, 3), np.uint8)).numpy()
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_computes_in_16_bits_and_ends_in_32(
    tiny_backbone: None, precision: str
) -> None:
    model = build_model(tiny_recipe(precision=precision), 3)
    _, backbone, *_, output = model.layers
    assert backbone.layers[2].compute_dtype == precision.removeprefix("mixed_")
    assert backbone.layers[2].variable_dtype == "float32"
    assert output.compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"


def test_float32_copy_computes_the_same_in_32_bits(tiny_backbone: None) -> None:
    recipe = tiny_recipe(precision="mixed_float16")
    model = build_model(recipe, 3)
    copy = build_float32_copy(model, recipe, 3)
    images = np.random.default_rng(0).integers(0, 256, (4, TINY_SIZE, TINY_SIZE, 3))
    np.testing.assert_allclose(copy(images), model(images), atol=5e-3)
    assert {layer.compute_dtype for layer in copy.layers} == {"float32"}
