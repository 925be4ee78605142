"""Batch normalisation merged into the convolutions before it: fewer layers, the same output.

TensorFlow merges too, but for EfficientNetB7 that takes 40 seconds and 7 GB, each time. Here the
merged network is built in four seconds.

Keras computes a convolution in groups, which ConvNeXt has, by a compiler of its own on a CPU. Where
each channel is a group, the copy has Keras' depthwise convolution instead.

After a change of what is merged, graphs that were kept are old: `har.inference.graph_cache.FORMAT`.
"""

from collections import Counter
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import layers

CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D)
LINEAR = keras.activations.linear
# What a Conv2D and a DepthwiseConv2D are both told.
DEPTHWISE_OPTIONS = (
    "name", "trainable", "dtype", "kernel_size", "strides", "padding", "data_format",
    "dilation_rate", "activation", "use_bias", "bias_initializer",
)  # fmt: skip


def fold_batch_norms(
    model: keras.Model, policy: str = "float32", size: int | None = None
) -> keras.Model:
    """Copy a functional model, and the models in it, with batch normalisation merged into the
    convolutions before it, and convolutions in groups of one channel as depthwise ones. The copy
    computes under `policy`, one of Keras' dtype policies, and takes images of `size` pixels if that
    is given.

    In float32 it infers the same to the rounding (1e-6 of the features' length). A normalisation
    that follows no linear convolution, or one whose output others read too, stays.
    """
    merged = _find_merged(model)
    dropped = set(merged.values())
    copies: dict[Any, Any] = {}

    def copy(layer: Any) -> Any:
        if layer in dropped:
            return layers.Identity()
        config = layer.get_config() | ({"use_bias": True} if layer in merged else {})
        # what a network writes as `x + y` is an operation, and no layer
        is_layer = isinstance(layer, layers.Layer)
        if policy != "float32" and is_layer:
            config["dtype"] = policy
        config |= _without_chance(config)
        twin = _copy_depthwise(config) if _is_depthwise(layer) else type(layer).from_config(config)
        if is_layer:
            copies[layer] = twin
        return twin

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if isinstance(layer, layers.Identity) else layer(*args, **kwargs)

    folded = keras.models.clone_model(
        model,
        clone_function=copy,
        call_function=call,
        recursive=True,
        input_tensors=layers.Input((size, size, 3)) if size else None,
    )
    for layer, twin in copies.items():
        _copy_weights(layer, twin, merged.get(layer))
    return folded


def _is_depthwise(layer: Any) -> bool:
    """Return whether a layer is a Conv2D that makes each channel from the same one before it."""
    if not isinstance(layer, layers.Conv2D):
        return False
    # a kernel is (height, width, channels of a group, filters)
    return bool(1 < layer.groups == layer.filters and layer.kernel.shape[2] == 1)


def _copy_depthwise(config: dict[str, Any]) -> Any:
    """Build a depthwise convolution from the options of a Conv2D."""
    same = {name: config[name] for name in DEPTHWISE_OPTIONS}
    return layers.DepthwiseConv2D.from_config(same | {"depthwise_initializer": "zeros"})


def _copy_weights(layer: Any, twin: Any, norm: Any | None) -> None:
    """Copy a layer's weights, merged with the batch normalisation after it if there is one."""
    weights = _merge(layer, norm) if norm else layer.get_weights()
    if _is_depthwise(layer):
        # (height, width, 1, channels) to (height, width, channels, 1)
        weights[0] = weights[0].swapaxes(2, 3)
    twin.set_weights(weights)
    if isinstance(twin, layers.Normalization):
        # it keeps what it computes with apart from its weights
        twin.finalize_state()


def _without_chance(config: dict[str, Any]) -> dict[str, Any]:
    """Return options with which building the layer draws no random numbers. Otherwise a training
    that computes features would draw other numbers afterwards than one that finds them cached.
    """
    zeros = {name: "zeros" for name in config if name.endswith("_initializer")}
    return zeros | ({"seed": 0} if "seed" in config else {})


def _find_merged(model: keras.Model) -> dict[Any, Any]:
    """Map each convolution to the batch normalisation to merge into it."""
    found: dict[Any, Any] = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= _find_merged(layer)
    by_output = {id(layer.output): layer for layer in model.layers}
    readers = Counter(
        id(tensor) for layer in model.layers for tensor in keras.tree.flatten(layer.input)
    )
    readers.update(id(tensor) for tensor in model.outputs)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization) and layer.scale and layer.center:
            # a normalisation may come first in its network
            before = by_output.get(id(layer.input))
            alone = readers[id(layer.input)] == 1
            if alone and isinstance(before, CONVOLUTIONS) and before.activation is LINEAR:
                found[before] = layer
    return found


def _merge(convolution: Any, norm: Any) -> list[npt.NDArray[np.float32]]:
    """Return the kernel and bias that give the normalised output."""
    kernel, *bias = convolution.get_weights()
    gamma, beta, mean, variance = (each.astype(np.float64) for each in norm.get_weights())
    factor = gamma / np.sqrt(variance + norm.epsilon)
    shift = beta + (sum(bias) - mean) * factor
    # a depthwise kernel's channels are its last two axes
    depthwise = isinstance(convolution, layers.DepthwiseConv2D)
    factors = factor.reshape(kernel.shape[2:]) if depthwise else factor
    return [(kernel * factors).astype(np.float32), shift.astype(np.float32)]
