"""Backbones by name: frozen Keras feature extractors, and the sources of their weights.

Every backbone maps (batch, size, size, 3) of 0..255 to (batch, features): normalisation is
part of the network. The notebooks also call Keras' `efficientnet.preprocess_input`, which
does nothing and is left out.
"""

import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import h5py
import keras
import numpy as np
from keras import layers

from har.models.efficientnet_lite import LITES, build_imagenet_lite, build_lite, find_last_stride
from har.models.hub import (
    HUB_NETWORKS,
    build_hub,
    check_hub,
    download_hub_weights,
    load_hub_weights,
)
from har.models.keras_file import check_keras_file, check_weights
from har.models.merging import fold_batch_norms
from har.recipe import Recipe
from har.util.errors import UserError, first_line
from har.util.files import digest_file

CPU_BACKBONE = "efficientnet-lite0"
# ImageNet weights are the same for every size, but MobileNetV3 warns about any other than this.
MOBILENET_SIZE = 224


@dataclass(frozen=True)
class Backbone:
    """Functions from an image size in pixels (None: any) to a network with random or ImageNet
    weights.

    `cpu_fallback` is the backbone that replaces this one on a machine without a GPU, where this
    one would take hours; "" if a CPU can train it. `cut` is the block with the last stride, or the
    first block after it, which starts from smaller features; of a transformer, the third from the
    end. `load` copies a weights file into the network, and `check` raises a UserError if what it
    needs is not installed.
    """

    build_random: Callable[[int | None], keras.Model]
    build_imagenet: Callable[[int | None], keras.Model]
    cpu_fallback: str = ""
    cut: str = ""
    load: Callable[[keras.Model, Path], Any] = keras.Model.load_weights
    check: Callable[[], None] = lambda: None


def keras_application(
    name: str,
    cpu_fallback: str = "",
    cut: str = "",
    pixels: Literal["0..255", "-1..1"] = "0..255",
    download_size: int | None = None,
) -> Backbone:
    """Wrap a network of keras.applications, such as `EfficientNetB7`. `pixels` are the values that
    it takes; one for -1..1 gets a layer that scales 0..255 to these. `download_size` is the image
    size with which Keras is asked for ImageNet weights, None for that of the recipe.
    """

    def build(image_size: int | None, weights: str | None = None) -> keras.Model:
        application = getattr(keras.applications, name)
        options = {"include_top": False, "weights": weights, "pooling": "avg"}
        shape = (image_size, image_size, 3)
        if pixels == "0..255":
            return application(input_shape=shape, **options)
        images = layers.Input(shape)
        scaled = layers.Rescaling(1 / 127.5, offset=-1.0)(images)
        network = application(input_shape=shape, input_tensor=scaled, **options)
        return keras.Model(images, network.output, name=network.name)

    def build_imagenet(image_size: int | None) -> keras.Model:
        try:
            downloaded = build(download_size or image_size, "imagenet")
        # Keras raises a bare Exception for every network error
        except Exception as error:
            raise UserError(
                f"cannot download the ImageNet weights of {name} ({first_line(error)}): use"
                " --weights FILE (a copy of Keras' file), --backbone efficientnet-lite0 (its"
                " weights are installed with this project), or --weights random"
            ) from error
        # With ImageNet weights, Keras adds one more layer to EfficientNet. Copy the weights into
        # the network without it: a saved model is rebuilt without ImageNet weights.
        network = build(image_size)
        copy_weights(downloaded, network)
        _square_imagenet_variance(network)
        return network

    return Backbone(build, build_imagenet, cpu_fallback, cut)


def hub_network(name: str) -> Backbone:
    """Wrap a member of HUB_NETWORKS."""

    def build_published(image_size: int | None) -> keras.Model:
        network = build_hub(name, image_size)
        _load_file(network, download_hub_weights(name), load_hub_weights)
        return network

    return Backbone(
        partial(build_hub, name),
        build_published,
        cut=f"blocks.{HUB_NETWORKS[name].kind.depth - 3}",
        load=load_hub_weights,
        check=check_hub,
    )


BACKBONES: dict[str, Backbone] = {
    **{
        f"efficientnetb{n}": keras_application(f"EfficientNetB{n}", CPU_BACKBONE, cut="block6a")
        for n in range(8)
    },
    **{
        name: Backbone(
            partial(build_lite, name),
            partial(build_imagenet_lite, name),
            cut=find_last_stride(lite),
        )
        for name, lite in LITES.items()
    },
    **{
        f"efficientnetv2-{size}": keras_application(f"EfficientNetV2{size.upper()}", cut="block6a")
        for size in ("b0", "b1", "b2", "b3", "s", "m", "l")
    },
    **{
        f"convnext-{size}": keras_application(
            f"ConvNeXt{size.title()}", cut=f"convnext_{size}_stage_3"
        )
        for size in ("tiny", "small", "base", "large")
    },
    "mobilenetv3-large": keras_application(
        "MobileNetV3Large", cut="expanded_conv_12", download_size=MOBILENET_SIZE
    ),
    "resnet50v2": keras_application("ResNet50V2", cut="conv5", pixels="-1..1"),
    **{name: hub_network(name) for name in HUB_NETWORKS},
}


def build_backbone(recipe: Recipe) -> keras.Model:
    """Build the recipe's backbone with its weights, and freeze what the recipe does not train."""
    backbone = BACKBONES[recipe.backbone]
    check_weights_reader(recipe)
    size = recipe.image_size if recipe.served_size == recipe.image_size else None
    if recipe.weights == "imagenet":
        network = backbone.build_imagenet(size)
    else:
        network = backbone.build_random(size)
        if recipe.weights != "random":
            _load_file(network, Path(recipe.weights), backbone.load)
    if recipe.fine_tune == "last_blocks":
        # unmerged, a training step takes up to a third longer, and is no more accurate
        network = fold_batch_norms(network)
    choose = FINE_TUNES[recipe.fine_tune]
    set_trainable(network, lambda convolutions: choose(convolutions, name_cut(recipe)))
    return network


def _from_cut(convolutions: list[keras.Layer], cut: str) -> list[keras.Layer]:
    names = [layer.name for layer in convolutions]
    return convolutions[_find_block(names, cut) :]


# Functions that choose the layers to train among a network's layers with weights, in order from
# the input, and the cut. They get no batch normalisation: small batches would spoil its statistics.
FINE_TUNES: dict[str, Callable[[list[keras.Layer], str], list[keras.Layer]]] = {
    "frozen": lambda convolutions, cut: [],
    "top": lambda convolutions, cut: convolutions[-math.ceil(len(convolutions) / 5) :],
    "all": lambda convolutions, cut: convolutions,
    "last_blocks": _from_cut,
}


def name_cut(recipe: Recipe) -> str:
    """Return the name of the first block to train."""
    return BACKBONES[recipe.backbone].cut if recipe.cut == "auto" else recipe.cut


def _find_block(names: Sequence[str], cut: str) -> int:
    """Return the place of the first layer of the block `cut`."""
    for place, name in enumerate(names):
        if name == cut or (name.startswith(cut) and not name[len(cut)].isalnum()):
            return place
    blocks = dict.fromkeys(map(_name_block, names))
    raise UserError(f"no block {cut!r} to cut before; the blocks are {', '.join(blocks)}")


def _name_block(layer: str) -> str:
    """Return the block of a layer: `blocks.11` of `blocks.11.bn0`, `conv5_block1` of
    `conv5_block1_2_conv`; for layers outside all blocks, the first word.
    """
    found = re.match(r".*(?:block|stage|expanded_conv|\bconv)s?[._]?\d+[a-z]?(?=[._]|$)", layer)
    return found[0] if found else re.split(r"[._](?=[a-z])", layer)[0]


def check_cut(recipe: Recipe) -> None:
    """Raise a UserError if the backbone has no block of the name that the user gave."""
    if recipe.cut == "auto":
        return
    network = BACKBONES[recipe.backbone].build_random(None)
    _find_block([layer.name for layer in network.layers if layer.weights], recipe.cut)


def find_cut(network: keras.Model, recipe: Recipe) -> Any:
    """Return the tensor that enters the first block to train."""
    layers_of = [layer for layer in network.layers if layer.weights]
    place = _find_block([layer.name for layer in layers_of], name_cut(recipe))
    return layers_of[place].input


def set_trainable(
    network: keras.Model, choose: Callable[[list[keras.Layer]], list[keras.Layer]]
) -> None:
    """Freeze all layers of `network` except those that `choose` returns."""
    frozen_kinds = (layers.BatchNormalization, layers.Normalization)
    chosen = choose([x for x in network.layers if x.weights and not isinstance(x, frozen_kinds)])
    network.trainable = bool(chosen)
    for layer in network.layers:
        layer.trainable = layer in chosen


def check_weights_reader(recipe: Recipe) -> None:
    """Raise a UserError unless what reads the recipe's weights is installed."""
    if recipe.weights != "random":
        BACKBONES[recipe.backbone].check()


def name_weights_by_content(recipe: Recipe) -> Recipe:
    """Replace the name of a weights file by its SHA-256, which does not depend on its folder."""
    if recipe.weights in ("imagenet", "random"):
        return recipe
    _check_weights_file(Path(recipe.weights))
    return replace(recipe, weights=f"sha256:{digest_file(Path(recipe.weights))}")


def _check_weights_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no such weights file: {path}; --weights is imagenet, random, or a file")


def _load_file(network: keras.Model, path: Path, load: Callable[[keras.Model, Path], Any]) -> None:
    """Load a weights file into `network` by `load`, once its size is known."""
    _check_weights_file(path)
    try:
        _check_size(path)
        with warnings.catch_warnings():
            # Keras only warns about a layer that is not in the file, and leaves it random
            warnings.simplefilter("error", UserWarning)
            load(network, path)
    # a damaged file makes h5py and Keras raise anything at all
    except Exception as error:
        raise UserError(
            f"{path} does not hold weights of {network.name} without top: {first_line(error)}"
        ) from error
    _square_imagenet_variance(network)


def _check_size(path: Path) -> None:
    """Raise a ValueError if a weights file would take more memory than any network of ours."""
    if zipfile.is_zipfile(path):
        check_keras_file(path)
    elif h5py.is_hdf5(path):
        check_weights(path)


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copy all weights; both networks have the same layers with weights."""
    target.set_weights(source.get_weights())
    for layer in _normalizations(target):
        # Normalization computes with copies of its weights, and set_weights does not update them
        layer.finalize_state()


def _normalizations(network: keras.Model) -> Iterator[layers.Normalization]:
    for layer in network.layers:
        if isinstance(layer, layers.Normalization):
            yield layer
        elif isinstance(layer, keras.Model):
            yield from _normalizations(layer)


def _square_imagenet_variance(network: keras.Model) -> None:
    """Make the Normalization layers divide by ImageNet's standard deviation.

    The weights files of keras.applications hold the standard deviation in the place of the
    variance, so the layer divides by the root of the deviation. Keras corrects that with one more
    Rescaling layer, but only with weights="imagenet". Squaring the value works for files too.
    """
    for layer in _normalizations(network):
        if not layer.weights:
            # mean and variance are constants, as in ConvNeXt, and correct
            continue
        mean, deviation, *count = layer.get_weights()
        if np.allclose(deviation, [0.229, 0.224, 0.225], atol=1e-3):
            layer.set_weights([mean, deviation**2, *count])
            layer.finalize_state()
