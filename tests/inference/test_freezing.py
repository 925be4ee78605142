"""Frozen graphs: no variables, the same output."""

import gc
from typing import Any

import keras
import numpy as np
import pytest

from har.inference.freezing import compile_frozen, freeze, trace


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
