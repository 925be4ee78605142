"""Backbone name to a frozen Keras feature extractor, and where its weights come from.

Every backbone maps (batch, size, size, 3) of 0..255 to (batch, features): normalisation is
part of the network. Keras' `efficientnet.preprocess_input`, which the notebooks call, does
nothing and has no place here.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import keras
import numpy as np
from keras import layers

from har.models.efficientnet_lite import LITES, build_imagenet_lite, build_lite
from har.recipe import Recipe
from har.util.errors import UserError, first_line
from har.util.files import digest_file

CPU_BACKBONE = "efficientnet-lite0"


@dataclass(frozen=True)
class Backbone:
    """Two ways to the same network, from an image size in pixels.

    `cpu_fallback` is the backbone that a variant gets in its place on a machine without a GPU,
    where this one would take hours; "" for a backbone that a CPU can train on.
    """

    build_random: Callable[[int], keras.Model]
    build_imagenet: Callable[[int], keras.Model]
    cpu_fallback: str = ""


def keras_application(name: str, cpu_fallback: str = "") -> Backbone:
    """A network of keras.applications that normalises 0..255 itself, e.g. `EfficientNetB7`."""

    def build(image_size: int, weights: str | None = None) -> keras.Model:
        return getattr(keras.applications, name)(
            include_top=False,
            weights=weights,
            input_shape=(image_size, image_size, 3),
            pooling="avg",
        )

    def build_imagenet(image_size: int) -> keras.Model:
        try:
            downloaded = build(image_size, "imagenet")
        # Keras raises bare Exception for anything the network does
        except Exception as error:
            raise UserError(
                f"the ImageNet weights of {name} cannot be downloaded ({first_line(error)});"
                " ways out: --weights FILE (a copy of Keras' file), --backbone"
                " efficientnet-lite0 (its weights are installed with this project), or"
                " --weights random"
            ) from error
        # Keras' ImageNet network has a layer more than any other. Every source of weights
        # must give one graph here, or a model could not be rebuilt and filled.
        network = build(image_size)
        copy_weights(downloaded, network)
        _square_imagenet_variance(network)
        return network

    return Backbone(build, build_imagenet, cpu_fallback)


BACKBONES: dict[str, Backbone] = {
    **{
        f"efficientnetb{n}": keras_application(f"EfficientNetB{n}", cpu_fallback=CPU_BACKBONE)
        for n in range(8)
    },
    **{
        name: Backbone(partial(build_lite, name), partial(build_imagenet_lite, name))
        for name in LITES
    },
}


def build_backbone(recipe: Recipe) -> keras.Model:
    """The recipe's backbone with its weights, trainable as far as the recipe says.

    Raises:
        UserError: the weights cannot be had; the message names the ways out.
    """
    backbone = BACKBONES[recipe.backbone]
    if recipe.weights == "imagenet":
        network = backbone.build_imagenet(recipe.image_size)
    else:
        network = backbone.build_random(recipe.image_size)
        if recipe.weights != "random":
            _load_file(network, Path(recipe.weights))
    set_trainable(network, FINE_TUNES[recipe.fine_tune])
    return network


# Which of a network's layers with weights to train, of those in order from the input. Batch
# normalisation is not among them: with small batches its statistics would wreck the features.
FINE_TUNES: dict[str, Callable[[list[keras.Layer]], list[keras.Layer]]] = {
    "frozen": lambda convolutions: [],
    "top": lambda convolutions: convolutions[-math.ceil(len(convolutions) / 5) :],
    "all": lambda convolutions: convolutions,
}


def set_trainable(
    network: keras.Model, choose: Callable[[list[keras.Layer]], list[keras.Layer]]
) -> None:
    """Freeze all of `network` but the layers that `choose` picks."""
    frozen_kinds = (layers.BatchNormalization, layers.Normalization)
    chosen = choose([x for x in network.layers if x.weights and not isinstance(x, frozen_kinds)])
    network.trainable = bool(chosen)
    for layer in network.layers:
        layer.trainable = layer in chosen


def name_weights_by_content(recipe: Recipe) -> Recipe:
    """The recipe with a weights file named by its SHA-256: equal wherever the file lies.

    Raises:
        UserError: no such file.
    """
    if recipe.weights in ("imagenet", "random"):
        return recipe
    _check_weights_file(Path(recipe.weights))
    return replace(recipe, weights=f"sha256:{digest_file(Path(recipe.weights))}")


def _check_weights_file(path: Path) -> None:
    """Raise a UserError if there is no such file."""
    if not path.is_file():
        raise UserError(f"no such weights file: {path} (or say imagenet, or random)")


def _load_file(network: keras.Model, path: Path) -> None:
    """Fill `network` from a Keras weights file; ImageNet files give ImageNet's network.

    Raises:
        UserError: no such file, or not weights of this network.
    """
    _check_weights_file(path)
    try:
        with warnings.catch_warnings():
            # Keras only warns of a layer that the file does not have, and leaves it random
            warnings.simplefilter("error", UserWarning)
            network.load_weights(path)
    except (UserWarning, ValueError, OSError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold weights of {network.name} without top: {first_line(error)}"
        ) from error
    _square_imagenet_variance(network)


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Set `target`'s weights to `source`'s; both have the same layers with weights."""
    target.set_weights(source.get_weights())
    for layer in _normalizations(target):
        # it keeps what it computes with apart from its weights, and only loading updates that
        layer.finalize_state()


def _normalizations(network: keras.Model) -> Iterator[layers.Normalization]:
    """The Normalization layers of a network and of the networks in it."""
    for layer in network.layers:
        if isinstance(layer, layers.Normalization):
            yield layer
        elif isinstance(layer, keras.Model):
            yield from _normalizations(layer)


def _square_imagenet_variance(network: keras.Model) -> None:
    """Make keras.applications' Normalization divide by ImageNet's standard deviation.

    Its weights file gives the standard deviation where the layer wants the variance, so the
    layer divides by its root. Keras repairs that with one more Rescaling layer, but only
    under weights="imagenet". Squaring the stored values gives the same network from a file.
    """
    for layer in _normalizations(network):
        if not layer.weights:
            # its mean and variance are constants, as in ConvNeXt: there is nothing to repair
            continue
        mean, deviation, *count = layer.get_weights()
        if np.allclose(deviation, [0.229, 0.224, 0.225], atol=1e-3):
            layer.set_weights([mean, deviation**2, *count])
            layer.finalize_state()
