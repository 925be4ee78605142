"""The networks of KerasHub that are backbones here, and the weights that it publishes.

KerasHub reads its own weights files. What it read is copied into a network of Keras' layers
(`har.models.vision_transformer`), so only a training that starts from such a file needs it.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import numpy.typing as npt

from har.models.vision_transformer import (
    HALVES,
    IMAGENET,
    Transformer,
    build_transformer,
    tanh_gelu,
)
from har.util.errors import UserError, first_line

Weights = list[npt.NDArray[Any]]
# The file with the weights, in each of KerasHub's presets.
PRESET_FILE = "model.weights.h5"
VISION_TOWER = "layers/sig_lip_vision_encoder"


@dataclass(frozen=True, kw_only=True)
class HubNetwork:
    """A network of KerasHub. `handle` is the version of its weights on Kaggle, `family` a key of
    FAMILIES.
    """

    kind: Transformer
    handle: str
    family: str


SMALL = Transformer(
    depth=12,
    width=384,
    heads=6,
    mlp=1536,
    patch=14,
    image_size=518,
    tokens=1,
    pixels=IMAGENET,
    pooling="class_and_mean",
)
BASE = replace(SMALL, width=768, heads=12, mlp=3072)
VIT = replace(BASE, patch=16, image_size=224, pixels=HALVES, pooling="class")
SIGLIP = replace(VIT, tokens=0, pooling="attention", gelu=tanh_gelu)


def _add_registers(kind: Transformer) -> Transformer:
    """Add four tokens. KerasHub antialiases the positions of these networks alone."""
    return replace(kind, tokens=5, antialias=True)


def _dinov2(kind: Transformer, preset: str) -> HubNetwork:
    return HubNetwork(kind=kind, handle=f"keras/dinov2/keras/{preset}/1", family="dinov2")


HUB_NETWORKS: dict[str, HubNetwork] = {
    "dinov2-small": _dinov2(SMALL, "dinov2_small"),
    "dinov2-base": _dinov2(BASE, "dinov2_base"),
    "dinov2-small-registers": _dinov2(_add_registers(SMALL), "dinov2_with_registers_small"),
    "dinov2-base-registers": _dinov2(_add_registers(BASE), "dinov2_with_registers_base"),
    "siglip2-base": HubNetwork(
        kind=SIGLIP, handle="keras/siglip/keras/siglip2_base_patch16_224/1", family="siglip"
    ),
    "vit-base": HubNetwork(
        kind=VIT, handle="keras/vit/keras/vit_base_patch16_224_imagenet/4", family="vit"
    ),
}


def build_hub(name: str, image_size: int | None) -> keras.Model:
    """Build a member of HUB_NETWORKS with random weights."""
    return build_transformer(HUB_NETWORKS[name].kind, name, image_size)


def download_hub_weights(name: str) -> Path:
    """Download the published weights, into kagglehub's cache."""
    import kagglehub

    try:
        return Path(kagglehub.model_download(HUB_NETWORKS[name].handle, path=PRESET_FILE))
    # kagglehub raises errors of its own, of requests and of the operating system
    except Exception as error:
        raise UserError(
            f"cannot download the weights of {name} ({first_line(error)}): use --weights FILE (the"
            f" {PRESET_FILE} of kaggle.com/models/{HUB_NETWORKS[name].handle}), --backbone"
            " efficientnet-lite0 (its weights are installed with this project), or --weights random"
        ) from error


def check_hub() -> None:
    """Raise a UserError unless KerasHub is installed, before any slow work."""
    if importlib.util.find_spec("keras_hub") is None:
        raise UserError(
            "the weights of DINOv2, SigLIP 2 and ViT are read by KerasHub: pip install"
            " 'keras-hub>=0.32,<0.33', or --weights random"
        )


def load_hub_weights(network: keras.Model, path: Path) -> None:
    """Copy the weights in a file of KerasHub's into `network`, a member of HUB_NETWORKS."""
    found = HUB_NETWORKS[network.name]
    read = FAMILIES[found.family](found.kind, path)
    layers = {layer.name: layer for layer in network.layers if layer.weights}
    assert read.keys() == layers.keys()
    for name, layer in layers.items():
        shapes = [weight.shape for weight in layer.weights]
        layer.set_weights(
            [value.reshape(shape) for value, shape in zip(read[name], shapes, strict=True)]
        )


def _read_dinov2(kind: Transformer, path: Path) -> dict[str, Weights]:
    import keras_hub

    network = keras_hub.models.DINOV2Backbone(
        patch_size=kind.patch,
        num_layers=kind.depth,
        hidden_dim=kind.width,
        num_heads=kind.heads,
        intermediate_dim=kind.mlp,
        num_register_tokens=kind.tokens - 1,
        image_shape=(kind.image_size, kind.image_size, 3),
        position_embedding_shape=(kind.image_size, kind.image_size),
    )
    network.load_weights(path)
    embedding = network.embeddings
    places = np.asarray(embedding.position_embeddings)[0]
    # registers have no place
    first = [np.asarray(embedding.cls_token)[0] + places[:1]]
    if kind.tokens > 1:
        first.append(np.asarray(embedding.register_tokens)[0])
    found = {
        "patches": embedding.patch_embeddings.projection.get_weights(),
        "positions": [places[1:]],
        "tokens": [np.concatenate(first)],
        "norm": network.layernorm.get_weights(),
    }
    for number, block in enumerate(network.encoder.layers):
        attention, mlp2 = (
            _scale_output(layer, scale)
            for layer, scale in (
                (block.attention.attention, block.layer_scale1),
                (block.mlp.fc2, block.layer_scale2),
            )
        )
        parts = (block.norm1, attention, block.norm2, block.mlp.fc1, mlp2)
        found |= _name_block(f"blocks.{number}", parts)
    return found


def _scale_output(layer: keras.Layer, scale: keras.Layer) -> Weights:
    """Return a layer's weights with the layer scale behind it multiplied in: the last kernel and
    bias give the output.
    """
    *others, kernel, bias = layer.get_weights()
    (factors,) = scale.get_weights()
    return [*others, kernel * factors, bias * factors]


def _name_block(name: str, parts: Any) -> dict[str, Weights]:
    """Map the names of a block's layers to the weights of its parts, layers or lists of weights."""
    names = ("norm1", "attention", "norm2", "mlp1", "mlp2")
    return {
        f"{name}.{each}": part if isinstance(part, list) else part.get_weights()
        for each, part in zip(names, parts, strict=True)
    }


def _read_vit(kind: Transformer, path: Path) -> dict[str, Weights]:
    import keras_hub

    network = keras_hub.models.ViTBackbone(
        image_shape=(kind.image_size, kind.image_size, 3),
        patch_size=kind.patch,
        num_layers=kind.depth,
        num_heads=kind.heads,
        hidden_dim=kind.width,
        mlp_dim=kind.mlp,
    )
    network.load_weights(path)
    _, embedding, encoder = network.layers
    (places,) = embedding.position_embedding.get_weights()
    found = {
        "patches": embedding.patch_embedding.get_weights(),
        "positions": [places[1:]],
        "tokens": [np.asarray(embedding.class_token)[0] + places[:1]],
        "norm": encoder.layer_norm.get_weights(),
    }
    for number, block in enumerate(encoder.encoder_layers):
        mlp = block.mlp
        parts = (block.layer_norm_1, block.mha, block.layer_norm_2, mlp.dense_1, mlp.dense_2)
        found |= _name_block(f"blocks.{number}", parts)
    return found


def _read_siglip(kind: Transformer, path: Path) -> dict[str, Weights]:
    import keras_hub

    network = keras_hub.models.SigLIPVisionEncoder(
        patch_size=kind.patch,
        hidden_dim=kind.width,
        num_layers=kind.depth,
        num_heads=kind.heads,
        intermediate_dim=kind.mlp,
        image_shape=(kind.image_size, kind.image_size, 3),
    )
    with tempfile.TemporaryDirectory() as folder:
        network.load_weights(_extract_vision_tower(path, Path(folder)))
    embedding, head = network.embedding, network.head
    found = {
        "patches": embedding.patch_embedding.get_weights(),
        "positions": embedding.position_embedding.get_weights(),
        "norm": network.post_layer_norm.get_weights(),
        "pool.token": [np.asarray(head.probe)],
        "pool.attention": head.attention.get_weights(),
        "pool.norm": head.layer_norm.get_weights(),
        "pool.mlp1": head.mlp.fc1.get_weights(),
        "pool.mlp2": head.mlp.fc2.get_weights(),
    }
    for number, block in enumerate(network.encoder_layers):
        mlp = block.mlp
        parts = (block.layer_norm1, block.self_attn, block.layer_norm2, mlp.fc1, mlp.fc2)
        found |= _name_block(f"blocks.{number}", parts)
    return found


def _extract_vision_tower(path: Path, folder: Path) -> Path:
    """Return a file of the image tower alone: a published file holds the text tower too, which
    has three times as many weights.
    """
    with h5py.File(path, "r") as file:
        if VISION_TOWER not in file:
            return path
        with h5py.File(alone := folder / PRESET_FILE, "w") as copy:
            for name in file[VISION_TOWER]:
                file.copy(f"{VISION_TOWER}/{name}", copy)
    return alone


# Functions that read a file's weights by the names of our layers.
FAMILIES: dict[str, Callable[[Transformer, Path], dict[str, Weights]]] = {
    "dinov2": _read_dinov2,
    "siglip": _read_siglip,
    "vit": _read_vit,
}
