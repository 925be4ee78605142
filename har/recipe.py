"""How a classifier is trained, as a frozen value, and the five notebooks as such values.

A recipe never says where the data lies, which machine runs it, or who watches.
The difference between two recipes is computed (`changes`), never narrated.
"""

import hashlib
import json
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from har.util.errors import UserError

Loader = Literal["memory", "stream", "features"]
Resize = Literal["bicubic", "bilinear"]
Augmentation = Literal["none", "flip_rotate_zoom_contrast"]
Backbone = Literal[
    "efficientnetb0",
    "efficientnetb1",
    "efficientnetb2",
    "efficientnetb3",
    "efficientnetb4",
    "efficientnetb5",
    "efficientnetb6",
    "efficientnetb7",
    "efficientnet-lite0",
    "efficientnet-lite1",
    "efficientnet-lite2",
]
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
    """A recipe field with its one description; `low` and `high` bound numbers, inclusive.

    `our_choice` says what we decided where the notebooks leave a value open. `added`: runs were
    recorded before this field existed, as if it had its default, so that the default must change
    nothing: at its default the field is no part of the digest.
    """
    metadata = {"help": help, "low": low, "high": high, "our_choice": our_choice, "added": added}
    return field(default=default, metadata=metadata)


def field_values(recipe: "Recipe") -> list[tuple[Field[Any], Any]]:
    """Every field with its value, in field order."""
    return [(each, getattr(recipe, each.name)) for each in fields(recipe)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every way in which one training can differ from another. Defaults: the original.

    Raises:
        UserError: a value is not among the allowed ones, or two values exclude each other.
    """

    loader: Loader = axis(
        "memory",
        "memory: decode every image into one array first; stream: decode during training; features:"
        " run the frozen backbone once, keep its output, and train the head on that",
        our_choice="v2 to v4 name no shuffle: shuffled anew each epoch, as Keras did the arrays",
    )
    resize: Resize = axis(
        "bicubic",
        "bicubic: as Pillow's Image.resize, antialiased; bilinear: as tf.image.resize, not",
    )
    image_size: int = axis(
        160, "height and width of the network's input, in pixels", low=32, high=1024
    )
    validation_fraction: float = axis(
        0.0,
        "share of the non-test images kept for validation, stratified; 0: none",
        low=0.0,
        high=0.9,
    )
    augmentation: Augmentation = axis(
        "none",
        "random changes to the training images",
        our_choice="flip left-right, rotation +-0.1 turns, zoom +-10 %, contrast +-10 %",
    )
    feature_views: int = axis(
        1,
        "loader features with augmentation: how many augmented views of each training image to"
        " run the backbone on; each epoch draws one of them",
        low=1,
        high=1000,
    )
    backbone: Backbone = axis("efficientnetb7", "the feature extractor")
    weights: str = axis("imagenet", "the backbone's weights: imagenet, random, or a file")
    fine_tune: FineTune = axis(
        "frozen",
        "which convolutions of the backbone are trained: none, the last fifth, or all; batch"
        " normalisation stays frozen",
    )
    head: Head = axis(
        "flatten_dense512",
        "flatten_dense512: Dense(512, relu) before the output; gap_dropout: Dropout(0.2)",
    )
    loss: Loss = axis("categorical_crossentropy", "sparse: on label ids instead of one-hot rows")
    batch_size: int = axis(
        32,
        "images a step, over all devices together",
        low=1,
        high=65536,
        our_choice="v2 to v4 do not state it: 32, Keras' default in the original",
    )
    learning_rate: float = axis(1e-3, "of Adam; Keras' default", low=1e-9, high=10.0)
    epochs: int = axis(
        40,
        "passes over the training images, at most",
        low=1,
        high=100_000,
        our_choice="v2 to v4 do not state it: 40, as in the original",
    )
    patience: int = axis(
        0,
        "stop after so many epochs without a better validation accuracy; 0: never",
        low=0,
        high=100_000,
        our_choice="v2 to v4 do not state it: 5, watching validation accuracy",
    )
    checkpoint: Checkpoint = axis(
        "last",
        "which epoch's weights to keep; best: by validation accuracy",
        our_choice="v2 to v4 do not state by what: validation accuracy",
    )
    precision: Precision = axis("float32", "Keras' dtype policy; the output stays float32")
    strategy: Strategy = axis(
        "one_device", "mirrored: tf.distribute.MirroredStrategy over every visible GPU"
    )
    diagnostics: Diagnostics = axis(
        "none", "explore: print the labels, their mapping and the devices before training"
    )
    seed: int = axis(
        0,
        "of initial weights, shuffling, augmentation, dropout",
        low=0,
        high=2**31 - 1,
        our_choice="no notebook sets one: 0",
    )

    def __post_init__(self) -> None:
        for each, value in field_values(self):
            _check_value(each, value)
        self.check_validation()
        self.check_features()

    def check_validation(self) -> None:
        """Raise a UserError where something watches validation and there is none."""
        needs_validation = {
            "patience": self.patience > 0,
            "checkpoint": self.checkpoint == "best",
        }
        for name, needed in needs_validation.items():
            if needed and self.validation_fraction == 0:
                raise UserError(
                    f"{name}={getattr(self, name)} watches validation accuracy, but"
                    " validation_fraction is 0: raise it, or set patience=0 and checkpoint=last"
                )

    def check_features(self) -> None:
        """Raise a UserError where features of the backbone would not be what is trained on."""
        if self.loader == "features" and self.fine_tune != "frozen":
            raise UserError(
                f"loader=features computes the backbone once, but fine_tune={self.fine_tune}"
                " changes it: set fine_tune=frozen, or another loader"
            )
        if self.feature_views > 1 and (self.loader != "features" or self.augmentation == "none"):
            raise UserError(
                f"feature_views={self.feature_views} are augmented views for loader=features:"
                f" with loader={self.loader} and augmentation={self.augmentation} set it to 1"
            )


def _check_value(each: Field[Any], value: Any) -> None:
    """Raise a UserError that names the field, the allowed values and the received one."""
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
        # bool is an int to isinstance, and NaN compares false to any bound
        fits = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
        if not fits:
            whole = "a whole number" if each.type is int else "a number"
            raise UserError(f"{each.name} must be {whole} from {low} to {high}; received {value!r}")


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
# v3 is v2's code on one P100: MirroredStrategy over one GPU. One recipe, two machines.
V3 = V2
V4 = replace(V3, precision="mixed_float16")
# Ours, no notebook's: the frozen backbone runs once over the images instead of once an epoch. Each
# augmented view would cost one more pass, and eight of them gained nothing (docs/experiment.md).
V5 = replace(V4, loader="features", augmentation="none")
VARIANTS: dict[str, Recipe] = {
    "original": ORIGINAL,
    "v1": V1,
    "v2": V2,
    "v3": V3,
    "v4": V4,
    "v5": V5,
}


def parent_of(variant: str) -> str | None:
    """The variant that `variant` was made from; None for the first."""
    names = list(VARIANTS)
    index = names.index(variant)
    return names[index - 1] if index else None


def changes(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Field name to (old value, new value), for the fields that differ, in field order."""
    return {
        each.name: (getattr(old, each.name), getattr(new, each.name))
        for each in fields(Recipe)
        if getattr(old, each.name) != getattr(new, each.name)
    }


def describe_changes(old: Recipe, new: Recipe) -> str:
    """`field=value, ...` for what `new` changes from `old`; empty where nothing does."""
    return ", ".join(f"{name}={value}" for name, (_, value) in changes(old, new).items())


def digest_recipe(recipe: Recipe) -> str:
    """16 hexadecimal digits, equal for equal recipes, with nothing of the hardware in them.

    An `added` field at its default changes no digest: older runs stay twins of newer ones.
    """
    values = {
        # 1 and 1.0 are one learning rate, but two JSON texts
        each.name: each.type(value) if each.type in (int, float) else value
        for each, value in field_values(recipe)
        if not (each.metadata["added"] and value == each.default)
    }
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
