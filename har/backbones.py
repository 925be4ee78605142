"""Backbone name to a frozen Keras feature extractor, and where its weights come from.

Every backbone maps (batch, size, size, 3) of 0..255 to (batch, features): normalisation is
part of the network. Keras' `efficientnet.preprocess_input`, which the notebooks call, does
nothing and has no place here.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from keras import layers

from har import efficientnet_lite
from har.errors import UserError, first_line
from har.recipe import Recipe


@dataclass(frozen=True)
class Backbone:
    """Two ways to the same network, from an image size in pixels."""

    build_random: Callable[[int], keras.Model]
    build_imagenet: Callable[[int], keras.Model]


def keras_efficientnet(name: str) -> Backbone:
    """One of keras.applications' EfficientNetB0..B7, e.g. `EfficientNetB7`."""

    def build(image_size: int, weights: str | None) -> keras.Model:
        return getattr(keras.applications, name)(
            include_top=False,
            weights=weights,
            input_shape=(image_size, image_size, 3),
            pooling="avg",
        )

    def build_imagenet(image_size: int) -> keras.Model:
        try:
            return build(image_size, "imagenet")
        # Keras raises bare Exception for anything the network does
        except Exception as error:
            raise UserError(
                f"the ImageNet weights of {name} cannot be downloaded ({first_line(error)});"
                " ways out: --weights FILE (a copy of Keras' file), --backbone"
                " efficientnet-lite0 (its weights are installed with this project), or"
                " --weights random"
            ) from error

    return Backbone(lambda size: build(size, None), build_imagenet)


BACKBONES: dict[str, Backbone] = {
    **{f"efficientnetb{n}": keras_efficientnet(f"EfficientNetB{n}") for n in range(8)},
    "efficientnet-lite0": Backbone(
        efficientnet_lite.build_lite0, efficientnet_lite.build_imagenet_lite0
    ),
}


def build_backbone(recipe: Recipe) -> keras.Model:
    """The recipe's backbone with its weights, frozen.

    Raises:
        UserError: the weights cannot be had; the message names the ways out.
    """
    backbone = BACKBONES[recipe.backbone]
    if recipe.weights == "imagenet":
        network = backbone.build_imagenet(recipe.image_size)
    else:
        network = backbone.build_random(recipe.image_size)
        if recipe.weights != "random":
            load_file(network, Path(recipe.weights))
    network.trainable = False
    return network


def load_file(network: keras.Model, path: Path) -> None:
    """Fill `network` from a Keras weights file; ImageNet files give ImageNet's network.

    Raises:
        UserError: no such file, or not weights of this network.
    """
    if not path.is_file():
        raise UserError(f"no such weights file: {path} (or say imagenet, or random)")
    try:
        with warnings.catch_warnings():
            # Keras only warns of a layer that the file does not have, and leaves it random
            warnings.simplefilter("error", UserWarning)
            network.load_weights(path)
    except (UserWarning, ValueError, OSError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold weights of {network.name} without top: {first_line(error)}"
        ) from error
    square_imagenet_variance(network)


def square_imagenet_variance(network: keras.Model) -> None:
    """Make keras.applications' Normalization divide by ImageNet's standard deviation.

    Its weights file gives the standard deviation where the layer wants the variance, so the
    layer divides by its root. Keras repairs that with one more Rescaling layer, but only
    under weights="imagenet". Squaring the stored values gives the same network from a file.
    """
    for layer in network.layers:
        if isinstance(layer, layers.Normalization):
            mean, deviation, *count = layer.get_weights()
            if np.allclose(deviation, [0.229, 0.224, 0.225], atol=1e-3):
                layer.set_weights([mean, deviation**2, *count])
                layer.finalize_state()
