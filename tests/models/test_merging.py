"""Batch normalisation merged: less to compute, the same output."""

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from har.models.backbones import BACKBONES
from har.models.build import build_model
from har.models.merging import fold_batch_norms
from tests.fixtures import tiny_recipe

IMAGES = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Of some random networks float32's rounding alone is beyond the bound: folded or not, as far
    from float64.
    """
    keras.utils.set_random_seed(3)


def randomise(model: keras.Model) -> keras.Model:
    """Statistics as after a training: new layers normalise nothing."""
    random = np.random.default_rng(1)
    for layer in norms(model):
        shape = layer.get_weights()[0].shape
        gamma, variance = random.uniform(0.5, 2, (2, *shape))
        layer.set_weights([gamma, *random.normal(0, 0.5, (2, *shape)), variance])
    return model


def norms(model: keras.Model) -> list[Any]:
    """Its batch normalisations, those of the models in it too."""
    found = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += norms(layer)
        elif isinstance(layer, layers.BatchNormalization):
            found.append(layer)
    return found


def assert_equal_inference(folded: keras.Model, model: keras.Model) -> None:
    wanted = np.asarray(model(IMAGES, training=False))
    found = np.asarray(folded(IMAGES, training=False))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "name", ["efficientnetb0", pytest.param("efficientnet-lite0", marks=pytest.mark.slow)]
)
def test_a_backbone_loses_every_normalisation_and_infers_the_same(name: str) -> None:
    network = randomise(BACKBONES[name].build_random(32))
    folded = fold_batch_norms(network)
    assert len(norms(network)) == 49
    assert norms(folded) == []
    assert_equal_inference(folded, network)


def test_the_backbone_inside_a_classifier_is_folded(tiny_backbone: None) -> None:
    model = build_model(tiny_recipe(), 3)
    folded = fold_batch_norms(model)
    assert_equal_inference(folded, model)
    assert norms(model)
    assert norms(folded) == []


def test_the_model_itself_stays_as_it_was() -> None:
    network = randomise(BACKBONES["efficientnet-lite0"].build_random(32))
    before = np.asarray(network(IMAGES, training=False))
    fold_batch_norms(network)
    np.testing.assert_array_equal(np.asarray(network(IMAGES, training=False)), before)
    assert len(norms(network)) == 49


def test_no_random_number_is_drawn() -> None:
    """Or a training that finds its features in the cache would go another way."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Dropout(0.2)(layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs)))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)))
    found = []
    for fold in (lambda _: None, fold_batch_norms):
        keras.utils.set_random_seed(0)
        fold(model)
        found.append([random.random(), np.random.rand(), float(keras.random.uniform(()))])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [layers.Conv2D, layers.DepthwiseConv2D])
def test_a_bias_before_the_normalisation_is_counted(kind: type) -> None:
    inputs = keras.Input((32, 32, 3))
    options = {"filters": 4} if kind is layers.Conv2D else {"depth_multiplier": 2}
    x = kind(kernel_size=3, bias_initializer="random_normal", **options)(inputs)
    model = randomise(keras.Model(inputs, layers.BatchNormalization()(x)))
    folded = fold_batch_norms(model)
    assert norms(folded) == []
    assert_equal_inference(folded, model)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_sums_and_products_that_are_no_layers_are_copied(policy: str) -> None:
    """As in ConvNeXt and MobileNetV3; they have no dtype policy of their own."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(4, 3)(inputs)
    model = keras.Model(inputs, (x + 3.0) * 0.5 + x)
    wanted, found = model(IMAGES), fold_batch_norms(model, policy)(IMAGES)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(keras.ops.cast(found, "float32"), wanted, atol=0.02 * scale)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_of_one_channel_become_a_depthwise_convolution(groups: int) -> None:
    """Other groups stay: a depthwise convolution cannot compute them."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(4, 3)(inputs)
    x = layers.Conv2D(4, 3, groups=groups, bias_initializer="random_normal", name="grouped")(x)
    model = randomise(keras.Model(inputs, layers.BatchNormalization()(x)))
    folded = fold_batch_norms(model)
    kind = layers.DepthwiseConv2D if groups == 4 else layers.Conv2D
    assert type(folded.get_layer("grouped")) is kind
    assert norms(folded) == []
    assert_equal_inference(folded, model)


def activated(inputs: Any) -> Any:
    return layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(inputs))


def read_twice(inputs: Any) -> Any:
    x = layers.Conv2D(4, 3)(inputs)
    return layers.Add()([x, layers.BatchNormalization()(x)])


def told(inputs: Any) -> Any:
    x = layers.Conv2D(4, 3)(inputs)
    return [x, layers.BatchNormalization()(x)]


def unscaled(inputs: Any) -> Any:
    return layers.BatchNormalization(center=False, scale=False)(layers.Conv2D(4, 3)(inputs))


def after_nothing(inputs: Any) -> Any:
    return layers.BatchNormalization()(inputs)


@pytest.mark.parametrize("build", [activated, read_twice, told, unscaled, after_nothing])
def test_what_cannot_be_merged_stays(build: Callable[[Any], Any]) -> None:
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, build(inputs))
    folded = fold_batch_norms(model)
    assert len(norms(folded)) == 1
    outputs = zip(folded(IMAGES), model(IMAGES), strict=True)
    for found, wanted in outputs:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)
