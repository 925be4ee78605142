"""A network for inference alone: batch normalisation merged into the convolutions before it.

TensorFlow does the same to a graph of constants, but for EfficientNetB7 it takes 40 seconds and
7 GB, every time; here the merged network is built in four.
"""

from collections import Counter
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D)
LINEAR = keras.activations.linear


def fold_batch_norms(model: keras.Model) -> keras.Model:
    """A copy of a functional model, and of the models in it, that infers the same to the rounding
    of float32 (1e-6 of the features' length): not for training.

    A normalisation that follows no linear convolution, or one that others read too, stays.
    """
    merged = find_merged(model)
    dropped = set(merged.values())
    copies: dict[Any, Any] = {}

    def copy(layer: Any) -> Any:
        if layer in dropped:
            return layers.Identity()
        config = layer.get_config() | ({"use_bias": True} if layer in merged else {})
        copies[layer] = type(layer).from_config(config | without_chance(config))
        return copies[layer]

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if isinstance(layer, layers.Identity) else layer(*args, **kwargs)

    folded = keras.models.clone_model(
        model, clone_function=copy, call_function=call, recursive=True
    )
    for layer, twin in copies.items():
        twin.set_weights(merge(layer, merged[layer]) if layer in merged else layer.get_weights())
        if isinstance(twin, layers.Normalization):
            # it keeps what it computes with apart from its weights
            twin.finalize_state()
    return folded


def without_chance(config: dict[str, Any]) -> dict[str, Any]:
    """A layer's options, so that building it draws no random numbers: others would be drawn
    afterwards, and a training whose features are cached would be another one.
    """
    zeros = {name: "zeros" for name in config if name.endswith("_initializer")}
    return zeros | ({"seed": 0} if "seed" in config else {})


def find_merged(model: keras.Model) -> dict[Any, Any]:
    """The convolutions to merge, each with its batch normalisation."""
    found: dict[Any, Any] = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= find_merged(layer)
    by_output = {id(layer.output): layer for layer in model.layers}
    readers = Counter(
        id(tensor) for layer in model.layers for tensor in keras.tree.flatten(layer.input)
    )
    readers.update(id(tensor) for tensor in model.outputs)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization) and layer.scale and layer.center:
            before = by_output[id(layer.input)]
            alone = readers[id(layer.input)] == 1
            if alone and isinstance(before, CONVOLUTIONS) and before.activation is LINEAR:
                found[before] = layer
    return found


def merge(convolution: Any, norm: Any) -> list[npt.NDArray[np.float32]]:
    """Kernel and bias that give the normalised output."""
    kernel, *bias = convolution.get_weights()
    gamma, beta, mean, variance = (each.astype(np.float64) for each in norm.get_weights())
    factor = gamma / np.sqrt(variance + norm.epsilon)
    shift = beta + (sum(bias) - mean) * factor
    # a depthwise kernel's channels are its last two axes
    depthwise = isinstance(convolution, layers.DepthwiseConv2D)
    factors = factor.reshape(kernel.shape[2:]) if depthwise else factor
    return [(kernel * factors).astype(np.float32), shift.astype(np.float32)]
