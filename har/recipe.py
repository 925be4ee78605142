"""`Recipe`, a frozen value that says how a classifier is trained, and the variants.

A recipe does not say where the images are, which machine trains, or who watches. The
difference between two recipes is computed (`changes`), not written down.
"""

import hashlib
import json
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from har.util.errors import UserError
from har.util.files import shorten_home

Loader = Literal["memory", "stream", "features"]
Resize = Literal["bicubic", "bilinear"]
Augmentation = Literal["none", "flip_rotate_zoom_contrast"]
Backbone = Literal[
    "efficientnetb0", "efficientnetb1", "efficientnetb2", "efficientnetb3", "efficientnetb4",
    "efficientnetb5", "efficientnetb6", "efficientnetb7",
    "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2",
]  # fmt: skip
FineTune = Literal["frozen", "top", "all"]
Head = Literal["flatten_dense512", "gap_dropout"]
Loss = Literal["categorical_crossentropy", "sparse_categorical_crossentropy"]
Checkpoint = Literal["last", "best"]
Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]
Strategy = Literal["one_device", "mirrored"]
Diagnostics = Literal["none", "explore"]


def axis(
    default: Any,
    help: str,
    *,
    low: float = 0,
    high: float = 1,
    our_choice: str = "",
    added: bool = False,
) -> Any:
    """Define a recipe field: its default, its help text, and the inclusive bounds of a number.

    `our_choice` says what this project chose where the notebooks do not state a value. `added`
    marks a field that older runs do not have. Its default must not change how they trained: the
    digest leaves the field out while it has its default.
    """
    metadata = {"help": help, "low": low, "high": high, "our_choice": our_choice, "added": added}
    return field(default=default, metadata=metadata)


def field_values(recipe: "Recipe") -> list[tuple[Field[Any], Any]]:
    """Return every field with its value, in the order of definition."""
    return [(each, getattr(recipe, each.name)) for each in fields(recipe)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting in which one training can differ from another. The defaults are `original`."""

    loader: Loader = axis(
        "memory",
        "memory: decode all images once into one array; stream: decode images during training;"
        " features: run the frozen backbone once, cache its output, and train only the head",
        our_choice="v2 to v4 do not state the shuffling: all training images, again in each epoch",
    )
    resize: Resize = axis(
        "bicubic",
        "bicubic: antialiased, as Pillow's Image.resize; bilinear: not antialiased, as"
        " tf.image.resize",
    )
    image_size: int = axis(
        160, "Height and width of the network's input, in pixels", low=32, high=1024
    )
    validation_fraction: float = axis(
        0.0,
        "Share of the images outside the test split to validate on, stratified; 0: no validation",
        high=0.9,
    )
    augmentation: Augmentation = axis(
        "none",
        "Random changes to the training images",
        our_choice="flip left-right, rotation +-0.1 turns, zoom +-10 %, contrast +-10 %",
    )
    feature_views: int = axis(
        1,
        "For loader features with augmentation: number of augmented copies of each training image"
        " to compute features of; each epoch draws one of them",
        low=1,
        high=1000,
    )
    backbone: Backbone = axis("efficientnetb7", "The network that turns an image into features")
    weights: str = axis("imagenet", "The backbone's weights: imagenet, random, or a file")
    fine_tune: FineTune = axis(
        "frozen",
        "Convolutions of the backbone to train: frozen: none; top: the last fifth; all. Batch"
        " normalisation always stays frozen",
    )
    head: Head = axis(
        "flatten_dense512",
        "Layers before the output; flatten_dense512: Dense(512, relu); gap_dropout: Dropout(0.2)",
    )
    loss: Loss = axis(
        "categorical_crossentropy",
        "categorical_crossentropy: from one-hot labels; sparse_categorical_crossentropy: from"
        " label ids",
    )
    batch_size: int = axis(
        32,
        "Images in a training step, over all devices together",
        low=1,
        high=65536,
        our_choice="v2 to v4 do not state it: 32, Keras' default, as in the original",
    )
    learning_rate: float = axis(1e-3, "Learning rate of Adam", low=1e-9, high=10.0)
    epochs: int = axis(
        40,
        "Maximum number of epochs",
        low=1,
        high=100_000,
        our_choice="v2 to v4 do not state it: 40, as in the original",
    )
    patience: int = axis(
        0,
        "Early stopping: stop after this many epochs without a better validation accuracy; 0: off",
        high=100_000,
        our_choice="v2 to v4 do not state it: 5 epochs, on validation accuracy",
    )
    checkpoint: Checkpoint = axis(
        "last",
        "Epoch whose weights to keep: the last, or the one with the best validation accuracy",
        our_choice="v2 to v4 do not state the metric: validation accuracy",
    )
    precision: Precision = axis("float32", "Keras' dtype policy; the output layer stays float32")
    strategy: Strategy = axis(
        "one_device", "mirrored: tf.distribute.MirroredStrategy over every visible GPU"
    )
    diagnostics: Diagnostics = axis(
        "none", "explore: print the labels, their ids and the devices before training"
    )
    seed: int = axis(
        0,
        "Seed of initial weights, shuffling, augmentation and dropout",
        high=2**31 - 1,
        our_choice="no notebook sets one: 0",
    )

    def __post_init__(self) -> None:
        for each, value in field_values(self):
            _check_value(each, value)
        watching = {"patience": self.patience > 0, "checkpoint": self.checkpoint == "best"}
        for name, watches in watching.items():
            if watches and self.validation_fraction == 0:
                raise UserError(
                    f"{name}={getattr(self, name)} watches validation accuracy, but"
                    " validation_fraction is 0: use --validation-fraction 0.2, or --patience 0"
                    " --checkpoint last"
                )
        if self.loader == "features" and self.fine_tune != "frozen":
            raise UserError(
                f"loader=features computes the backbone once, but fine_tune={self.fine_tune}"
                " changes it: use --fine-tune frozen, or another --loader"
            )
        if self.feature_views > 1 and (self.loader != "features" or self.augmentation == "none"):
            raise UserError(
                f"feature_views={self.feature_views} are augmented views for loader=features: with"
                f" loader={self.loader} and augmentation={self.augmentation} set it to 1"
            )


def _check_value(each: Field[Any], value: Any) -> None:
    if get_origin(each.type) is Literal:
        allowed = get_args(each.type)
        if value not in allowed:
            raise UserError(f"{each.name} must be one of {', '.join(allowed)}; received {value!r}")
    elif each.type is str:
        if not isinstance(value, str) or not value:
            raise UserError(f"{each.name} must be a word or a file name; received {value!r}")
    else:
        kind = int if each.type is int else (int, float)
        low, high = each.metadata["low"], each.metadata["high"]
        # isinstance takes a bool for an int, and every comparison with NaN is false
        fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
        if not fits:
            number = "a whole number" if each.type is int else "a number"
            raise UserError(
                f"{each.name} must be {number} from {low} to {high}; received {value!r}"
            )


# The five notebooks, and v5. `har variants` prints the differences, and docs/experiment.md has
# the measured accuracies and times, with the commands.
ORIGINAL = Recipe()
V1 = replace(ORIGINAL, diagnostics="explore")
V2 = replace(
    V1,
    loader="stream",
    resize="bilinear",
    validation_fraction=0.2,
    augmentation="flip_rotate_zoom_contrast",
    head="gap_dropout",
    loss="sparse_categorical_crossentropy",
    patience=5,
    checkpoint="best",
    strategy="mirrored",
    diagnostics="none",
)
# The notebook of v3 runs v2's code on other hardware: one GPU instead of two.
V3 = V2
V4 = replace(V3, precision="mixed_float16")
# Not a notebook. The frozen backbone runs once over the images, not once in each epoch. It does
# not augment: each augmented view would cost one more pass over the images, and eight views did
# not raise the accuracy (docs/experiment.md).
V5 = replace(V4, loader="features", augmentation="none")
VARIANTS = {"original": ORIGINAL, "v1": V1, "v2": V2, "v3": V3, "v4": V4, "v5": V5}


def parent_of(variant: str) -> str | None:
    """Return the variant that `variant` was derived from; None for the first."""
    names = list(VARIANTS)
    index = names.index(variant)
    return names[index - 1] if index else None


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Map each field that differs to (old value, new value), in the order of definition."""
    pairs = {each.name: (getattr(old, each.name), value) for each, value in field_values(new)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe_changes(old: Recipe, new: Recipe) -> str:
    """Format what `new` changes as `field=value, ...`; "" for equal recipes."""
    changed = changes(old, new).items()
    return ", ".join(f"{name}={shorten_home(str(value))}" for name, (_, value) in changed)


def digest_recipe(recipe: Recipe) -> str:
    """Return 16 hexadecimal digits that are the same for equal recipes on any hardware.

    An `added` field with its default is left out, so that recipes of older runs keep their digest.
    """
    values = {
        # 1 and 1.0 are the same learning rate, but different JSON
        each.name: each.type(value) if each.type in (int, float) else value
        for each, value in field_values(recipe)
        if not (each.metadata["added"] and value == each.default)
    }
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
