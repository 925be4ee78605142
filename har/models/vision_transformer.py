"""Vision transformers of Keras' own layers: DINOv2, SigLIP 2 and ViT.

KerasHub has the same networks, each with positions for one image size and, but for SigLIP's, all
blocks in one layer. Here a block is several layers, so training can start at any block; the
positions fit themselves to the image; and a server needs no KerasHub.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
from keras import initializers, layers, ops

# The mean and standard deviation of red, green and blue, for pixels of 0..1: of ImageNet, and those
# that give -1..1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A network's measures.

    It was trained on images of `image_size` pixels in height and width, normalised by the mean and
    standard deviation in `pixels`. `tokens` stand before those of the patches: the class token, if
    there is one, then the registers. `antialias` says how its table of positions is made smaller.
    """

    depth: int
    width: int
    heads: int
    mlp: int
    patch: int
    image_size: int
    tokens: int
    pixels: tuple[tuple[float, ...], tuple[float, ...]]
    pooling: Literal["class_and_mean", "class", "attention"]
    gelu: Any = "gelu"
    antialias: bool = False

    @property
    def positions(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch) ** 2


@keras.saving.register_keras_serializable("har")
def tanh_gelu(x: Any) -> Any:
    """GELU by a hyperbolic tangent, as SigLIP was trained with."""
    return keras.activations.gelu(x, approximate=True)


@keras.saving.register_keras_serializable("har")
class Positions(layers.Layer):
    """Adds to (batch, height, width, features) patches a learned embedding of each place.

    The table is square and has `input_dim` places. For any other height and width it is resized by
    bicubic interpolation; `antialias` smooths it where that makes it smaller.
    """

    def __init__(
        self,
        input_dim: int,
        antialias: bool = False,
        table_initializer: Any = "truncated_normal",
        **options: Any,
    ) -> None:
        """The options have Keras' names: sizes in other people's files are bounded by these, and
        copies of a network draw no initial values.
        """
        super().__init__(**options)
        self.input_dim, self.antialias = input_dim, antialias
        self.table_initializer = initializers.get(table_initializer)

    def build(self, input_shape: Any) -> None:  # noqa: D102
        shape = (self.input_dim, input_shape[-1])
        self.table = self.add_weight(shape, self.table_initializer, name="table")

    def call(self, patches: Any) -> Any:  # noqa: D102
        _, height, width, _ = ops.shape(patches)
        side = math.isqrt(self.input_dim)
        table = ops.reshape(ops.convert_to_tensor(self.table), (side, side, -1))
        rows, columns = (
            ops.cast(_weigh_places(side, places, self.antialias), table.dtype)
            for places in (height, width)
        )
        resized = ops.einsum("wc,hcf->hwf", columns, ops.einsum("hr,rcf->hcf", rows, table))
        return patches + resized

    def compute_output_shape(self, input_shape: Any) -> Any:  # noqa: D102
        return input_shape

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return super().get_config() | {
            "input_dim": self.input_dim,
            "antialias": self.antialias,
            "table_initializer": initializers.serialize(self.table_initializer),
        }


def _weigh_places(source: int, target: Any, antialias: bool) -> Any:
    """Return (target, source) weights of Keys' bicubic interpolation, as TensorFlow computes it."""
    target = ops.cast(target, "float32")
    scale = source / target
    places = (ops.arange(target, dtype="float32") + 0.5) * scale - 0.5
    d = ops.abs(ops.expand_dims(places, 1) - ops.arange(source, dtype="float32"))
    if antialias:
        d = d / ops.maximum(scale, 1.0)
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = ops.where(d < 1, near, ops.where(d < 2, far, 0.0))
    return weights / ops.sum(weights, axis=1, keepdims=True)


@keras.saving.register_keras_serializable("har")
class LearnedTokens(layers.Layer):
    """Maps (batch, tokens, features) to (batch, units, features): `units` learned tokens, the same
    for every image.
    """

    def __init__(
        self, units: int, tokens_initializer: Any = "truncated_normal", **options: Any
    ) -> None:
        """The options have Keras' names, as those of `Positions`."""
        super().__init__(**options)
        self.units = units
        self.tokens_initializer = initializers.get(tokens_initializer)

    def build(self, input_shape: Any) -> None:  # noqa: D102
        shape = (self.units, input_shape[-1])
        self.tokens = self.add_weight(shape, self.tokens_initializer, name="tokens")

    def call(self, tokens: Any) -> Any:  # noqa: D102
        return ops.tile(ops.expand_dims(self.tokens, 0), (ops.shape(tokens)[0], 1, 1))

    def compute_output_shape(self, input_shape: Any) -> Any:  # noqa: D102
        return (input_shape[0], self.units, input_shape[-1])

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return super().get_config() | {
            "units": self.units,
            "tokens_initializer": initializers.serialize(self.tokens_initializer),
        }


def build_transformer(kind: Transformer, name: str, image_size: int | None) -> keras.Model:
    """Build (batch, size, size, 3) of 0..255 to (batch, features), with random weights."""
    images = layers.Input((image_size, image_size, 3))
    mean, deviation = 255 * np.array(kind.pixels)
    x = layers.Normalization(mean=mean.tolist(), variance=(deviation**2).tolist())(images)
    x = layers.Conv2D(kind.width, kind.patch, strides=kind.patch, name="patches")(x)
    x = Positions(kind.positions, kind.antialias, name="positions")(x)
    x = layers.Reshape((-1, kind.width))(x)
    if kind.tokens:
        x = layers.Concatenate(axis=1)([LearnedTokens(kind.tokens, name="tokens")(x), x])
    for number in range(kind.depth):
        x = _add_block(x, f"blocks.{number}", kind)
    x = _normalize(x, "norm")
    return keras.Model(images, POOLINGS[kind.pooling](x, kind), name=name)


def _add_block(x: Any, name: str, kind: Transformer) -> Any:
    """Add attention and a perceptron, each behind a normalisation and beside a bypass."""
    y = _normalize(x, f"{name}.norm1")
    x = layers.Add()([x, _attend(y, y, f"{name}.attention", kind)])
    return layers.Add()([x, _add_mlp(_normalize(x, f"{name}.norm2"), name, kind)])


def _normalize(x: Any, name: str) -> Any:
    return layers.LayerNormalization(epsilon=1e-6, name=name)(x)


def _attend(query: Any, value: Any, name: str, kind: Transformer) -> Any:
    return layers.MultiHeadAttention(kind.heads, kind.width // kind.heads, name=name)(query, value)


def _add_mlp(x: Any, name: str, kind: Transformer) -> Any:
    x = layers.Dense(kind.mlp, activation=kind.gelu, name=f"{name}.mlp1")(x)
    return layers.Dense(kind.width, name=f"{name}.mlp2")(x)


def _pool_attention(x: Any, kind: Transformer) -> Any:
    """Let one learned token ask all patches, as SigLIP does."""
    pooled = _attend(LearnedTokens(1, name="pool.token")(x), x, "pool.attention", kind)
    mlp = _add_mlp(_normalize(pooled, "pool.norm"), "pool", kind)
    return layers.Flatten()(layers.Add()([pooled, mlp]))


def _pool_class_and_mean(x: Any, kind: Transformer) -> Any:
    """Join the class token and the mean of the patches, as DINOv2's own linear classifiers do
    (`dinov2/hub/classifiers.py`).
    """
    return layers.Concatenate()([x[:, 0], ops.mean(x[:, kind.tokens :], axis=1)])


POOLINGS: dict[str, Callable[[Any, Transformer], Any]] = {
    "class_and_mean": _pool_class_and_mean,
    "class": lambda x, kind: x[:, 0],
    "attention": _pool_attention,
}
