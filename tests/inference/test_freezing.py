"""Batch normalisation merged, graphs frozen: less to compute, the same output."""

import gc
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from har.inference.freezing import compile_frozen, fold_batch_norms, freeze, trace
from har.models.backbones import BACKBONES
from har.models.build import build_model
from tests.conftest import tiny_recipe

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


@pytest.mark.parametrize("name", ["efficientnetb0", "efficientnet-lite0"])
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


@pytest.fixture(scope="module")
def model() -> keras.Model:
    """Batch normalisation, swish, and a Normalization layer, which captures plain tensors."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    normalization = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])
    x = keras.layers.Conv2D(4, 3, activation="swish")(normalization(inputs))
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def test_a_frozen_graph_computes_what_keras_does(model: keras.Model) -> None:
    compiled = compile_frozen(freeze(trace(model, "float32")))
    for count in (1, 5):
        images = np.random.default_rng(count).uniform(0, 255, (count, 16, 16, 3)).astype("float32")
        expected = model(images, training=False)
        np.testing.assert_allclose(compiled(images), expected, rtol=1e-5, atol=1e-4)


def test_a_frozen_graph_keeps_its_weights_when_the_model_learns_on(model: keras.Model) -> None:
    compiled = compile_frozen(freeze(trace(model, "float32")))
    images = np.ones((2, 16, 16, 3), np.float32)
    before = compiled(images).numpy()
    weights = model.get_weights()
    model.set_weights([each + 1 for each in weights])
    np.testing.assert_array_equal(compiled(images), before)
    model.set_weights(weights)


def test_a_traced_network_keeps_its_model() -> None:
    def build() -> tuple[Any, np.ndarray]:
        inputs = keras.Input((8, 8, 3))
        pooled = keras.layers.GlobalAveragePooling2D()(inputs)
        network = keras.Model(inputs, keras.layers.Dense(2)(pooled))
        return trace(network, "float32"), network(images).numpy()

    images = np.ones((2, 8, 8, 3), np.float32)
    traced, expected = build()
    gc.collect()
    np.testing.assert_allclose(traced(images), expected, rtol=1e-6)
    assert len(traced.variables) == 2


def test_a_frozen_graph_has_no_variables_left(model: keras.Model) -> None:
    frozen = freeze(trace(model, "uint8"))
    ops = {node.op for node in frozen.graph_def.node}
    assert not ops & {"ReadVariableOp", "VarHandleOp"}
    placeholders = [node.name for node in frozen.graph_def.node if node.op == "Placeholder"]
    assert placeholders == [frozen.input]
