"""`Recipe`, a frozen value that says how a classifier is trained, and the variants.

A recipe does not say where the images are, which machine trains, or who watches. The
difference between two recipes is computed (`changes`), not written down.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin

from har.util.errors import UserError
from har.util.files import shorten_home

Loader = Literal["memory", "stream", "features"]
Resize = Literal["bicubic", "bilinear"]
Augmentation = Literal["none", "flip_rotate_zoom_contrast", "mirror", "crop_flip_color"]
Backbone = Literal[
    "efficientnetb0", "efficientnetb1", "efficientnetb2", "efficientnetb3", "efficientnetb4",
    "efficientnetb5", "efficientnetb6", "efficientnetb7",
    "efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2",
    "efficientnetv2-b0", "efficientnetv2-b1", "efficientnetv2-b2", "efficientnetv2-b3",
    "efficientnetv2-s", "efficientnetv2-m", "efficientnetv2-l",
    "convnext-tiny", "convnext-small", "convnext-base", "convnext-large",
    "mobilenetv3-large", "resnet50v2",
    "dinov2-small", "dinov2-base", "dinov2-small-registers", "dinov2-base-registers",
    "siglip2-base", "vit-base",
]  # fmt: skip
FineTune = Literal["frozen", "top", "all", "last_blocks"]
Head = Literal["flatten_dense512", "gap_dropout", "linear_probe"]
HeadStart = Literal["random", "linear_probe"]
Loss = Literal["categorical_crossentropy", "sparse_categorical_crossentropy"]
Optimizer = Literal["adam", "adamw"]
Schedule = Literal["constant", "cosine"]
Mixing = Literal["none", "mixup"]
ClassWeight = Literal["none", "balanced"]
Checkpoint = Literal["last", "best"]
Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]
Strategy = Literal["one_device", "mirrored"]
Diagnostics = Literal["none", "explore"]
TestTime = Literal["none", "mirror"]
Calibration = Literal["none", "temperature"]
Suspects = Literal["keep", "leave_out"]

# With this share of validation images or more, out-of-fold predictions have only two folds.
MAX_SUSPECT_FRACTION = 0.4


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
        " features: run the frozen backbone, or its frozen blocks, once, cache the output, and"
        " train only what follows",
        our_choice="v2 to v4 do not state the shuffling: all training images, again in each epoch",
    )
    resize: Resize = axis(
        "bicubic",
        "bicubic: antialiased, as Pillow's Image.resize; bilinear: not antialiased, as"
        " tf.image.resize",
    )
    image_size: int = axis(
        160,
        "Height and width of the network's input, in pixels. v6 and v7 take the backbone's own size"
        " if you name one that is no efficientnetb0 to b7 or -lite, and no size",
        low=32,
        high=1024,
    )
    evaluation_size: int = axis(
        0,
        "Height and width, in pixels, of images that are validated on, evaluated and served; 0:"
        " image_size. About a quarter above image_size it is more accurate",
        high=1024,
        added=True,
    )
    validation_fraction: float = axis(
        0.0,
        "Share of the images outside the test split to validate on, stratified; 0: no validation",
        high=0.9,
    )
    suspects: Suspects = axis(
        "keep",
        "Training images whose label is in doubt, by a linear probe as in `har audit-labels`."
        " leave_out: do not train on them; all are validated on. Needs `pip install cleanlab`",
        added=True,
    )
    augmentation: Augmentation = axis(
        "none",
        "Random changes to the training images. mirror: left-right alone; crop_flip_color: a random"
        " part of the image, mirrored, with other brightness and contrast",
        our_choice="flip left-right, rotation +-0.1 turns, zoom +-10 %, contrast +-10 %",
    )
    crop_area: float = axis(
        0.35,
        "For augmentation crop_flip_color: the smallest share of the image's area that a crop has",
        low=0.01,
        added=True,
    )
    feature_views: int = axis(
        1,
        "For loader features with augmentation: number of augmented copies of each training image"
        " to compute features of; each epoch draws one of them. For augmentation mirror: 2, the"
        " image and its mirror image",
        low=1,
        high=1000,
    )
    mixing: Mixing = axis(
        "none", "mixup: blend each training image, and its label, with another", added=True
    )
    backbone: Backbone = axis("efficientnetb7", "The network that turns an image into features")
    weights: str = axis("imagenet", "The backbone's weights: imagenet, random, or a file")
    fine_tune: FineTune = axis(
        "frozen",
        "Convolutions of the backbone to train: frozen: none; top: the last fifth; all;"
        " last_blocks: those from the block `cut` on, with batch normalisation merged into all"
        " convolutions. Else batch normalisation always stays frozen",
    )
    cut: str = axis(
        "auto",
        "For fine_tune last_blocks: the first block to train, by its name in the backbone, such as"
        " blocks.11; auto: the block with the last stride, or the first block after it",
        added=True,
    )
    head: Head = axis(
        "flatten_dense512",
        "Layers before the output; flatten_dense512: Dense(512, relu); gap_dropout: Dropout(0.2);"
        " linear_probe: the features' square roots, behind which the output layer is solved for"
        " (logistic regression) instead of trained in epochs",
    )
    head_start: HeadStart = axis(
        "random",
        "Initial output layer: random, or linear_probe, solved for on the frozen backbone's"
        " features",
        added=True,
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
    label_smoothing: float = axis(
        0.0, "Share of each label that is spread over all classes in training", high=0.9, added=True
    )
    class_weight: ClassWeight = axis(
        "none", "balanced: rare classes count as much in the loss as frequent ones", added=True
    )
    optimizer: Optimizer = axis("adam", "Keras' optimizer", added=True)
    learning_rate: float = axis(1e-3, "Learning rate of the optimizer", low=1e-9, high=10.0)
    schedule: Schedule = axis(
        "constant",
        "Learning rate over the epochs; cosine: falls to 0 along a cosine",
        added=True,
    )
    warmup_epochs: float = axis(
        0.0, "For schedule cosine: epochs in which the rate rises from 0", high=1000.0, added=True
    )
    weight_decay: float = axis(
        0.0, "For optimizer adamw: weight decay, not of biases", high=1.0, added=True
    )
    global_clipnorm: float = axis(
        0.0, "Largest norm of all gradients together; 0: any", high=1e6, added=True
    )
    ema_momentum: float = axis(
        0.0,
        "Keep an exponential moving average of the weights with this momentum, and evaluate it; 0:"
        " keep the weights themselves",
        high=0.99999,
        added=True,
    )
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
    test_time: TestTime = axis(
        "none",
        "mirror: the model averages the probabilities of an image and its mirror image, at twice"
        " the cost",
        added=True,
    )
    calibration: Calibration = axis(
        "none",
        "temperature: scale the probabilities so that they are right as often as they say, by a"
        " number fitted on images that were not trained on",
        added=True,
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
            check_value(each, value)
        for check in _RULES:
            if problem := check(self):
                raise UserError(problem)

    @property
    def served_size(self) -> int:
        """Height and width, in pixels, of the images that the finished model takes."""
        return self.evaluation_size or self.image_size

    @property
    def source_size(self) -> int:
        """Height and width, in pixels, that training images are decoded to before augmentation."""
        cropped = self.augmentation == "crop_flip_color"
        return max(self.image_size, self.served_size) if cropped else self.image_size

    def at_size(self, size: int) -> "Recipe":
        """Return the same recipe for images of this one size."""
        return replace(self, image_size=size, evaluation_size=0)

    @property
    def solved(self) -> bool:
        """Return whether the head is solved for, in the place of all epochs."""
        return self.head == "linear_probe"


def _check_validation(recipe: Recipe) -> str:
    watching = {
        "patience": recipe.patience > 0,
        "checkpoint": recipe.checkpoint == "best",
        "calibration": recipe.calibration != "none",
        "suspects": recipe.suspects != "keep" and recipe.solved,
    }
    off = {"patience": "0", "checkpoint": "last", "calibration": "none", "suspects": "keep"}
    for name, watches in watching.items():
        if watches and recipe.validation_fraction == 0:
            return (
                f"{name}={getattr(recipe, name)} needs validation images, but validation_fraction"
                f" is 0: use --validation-fraction 0.2, or --{name} {off[name]}"
            )
    return ""


def _check_features(recipe: Recipe) -> str:
    if recipe.loader == "features" and recipe.fine_tune not in ("frozen", "last_blocks"):
        return (
            f"loader=features computes the backbone once, but fine_tune={recipe.fine_tune}"
            " changes it: use --fine-tune frozen or last_blocks, or another --loader"
        )
    if recipe.feature_views > 1 and (recipe.loader != "features" or recipe.augmentation == "none"):
        return (
            f"feature_views={recipe.feature_views} are augmented views for loader=features: with"
            f" loader={recipe.loader} and augmentation={recipe.augmentation} set it to 1"
        )
    mirrored = recipe.loader == "features" and recipe.augmentation == "mirror"
    if mirrored and recipe.feature_views != 2:
        return (
            "augmentation=mirror has two views of an image; received"
            f" feature_views={recipe.feature_views}: use --feature-views 2"
        )
    return ""


def _check_head(recipe: Recipe) -> str:
    frozen = recipe.loader == "features" and recipe.fine_tune == "frozen"
    if recipe.head == "linear_probe" and not frozen:
        return (
            "head=linear_probe is solved for on features of the frozen backbone; received"
            f" loader={recipe.loader}, fine_tune={recipe.fine_tune}: use --loader features"
            " --fine-tune frozen, or --head gap_dropout --head-start linear_probe"
        )
    doubts = recipe.solved and recipe.suspects == "leave_out"
    if doubts and recipe.validation_fraction >= MAX_SUSPECT_FRACTION:
        return (
            "suspects=leave_out with head=linear_probe needs three folds; received"
            f" validation_fraction={recipe.validation_fraction}: use --validation-fraction 0.2, or"
            " --suspects keep"
        )
    if recipe.head_start == "linear_probe" and recipe.head != "gap_dropout":
        return (
            "head_start=linear_probe starts the output layer behind the features; received"
            f" head={recipe.head}: use --head gap_dropout, or --head-start random"
        )
    return ""


def _check_loss(recipe: Recipe) -> str:
    soft = {"label_smoothing": 0.0, "mixing": "none"}
    for name, off in soft.items():
        value = getattr(recipe, name)
        if value != off and recipe.loss != "categorical_crossentropy":
            return (
                f"{name}={value} needs labels of several classes, but loss={recipe.loss}: use"
                f" --loss categorical_crossentropy, or --{name.replace('_', '-')} {off}"
            )
    return ""


def _check_optimizer(recipe: Recipe) -> str:
    if recipe.ema_momentum and recipe.checkpoint == "best":
        return (
            f"ema_momentum={recipe.ema_momentum} averages the weights of all epochs, and"
            " checkpoint=best keeps those of one: use --checkpoint last, or --ema-momentum 0"
        )
    if recipe.weight_decay and recipe.optimizer != "adamw":
        return (
            f"weight_decay={recipe.weight_decay} needs optimizer=adamw; received"
            f" optimizer={recipe.optimizer}: use --optimizer adamw, or --weight-decay 0"
        )
    if recipe.warmup_epochs and recipe.schedule != "cosine":
        return (
            f"warmup_epochs={recipe.warmup_epochs} needs schedule=cosine; received"
            f" schedule={recipe.schedule}: use --schedule cosine, or --warmup-epochs 0"
        )
    if recipe.warmup_epochs >= recipe.epochs:
        return (
            f"warmup_epochs={recipe.warmup_epochs} must be fewer than the epochs; received"
            f" epochs={recipe.epochs}"
        )
    return ""


def _check_sizes(recipe: Recipe) -> str:
    if 0 < recipe.evaluation_size < 32:
        return f"evaluation_size must be 0 or from 32 to 1024; received {recipe.evaluation_size}"
    patch = PATCH_SIZES.get(recipe.backbone, 1)
    for name in ("image_size", "evaluation_size"):
        if (size := getattr(recipe, name)) % patch:
            lower = size // patch * patch
            return (
                f"{name} must be a multiple of {patch} for backbone={recipe.backbone}, which cuts"
                f" the image into squares of {patch} pixels; received {size}: use"
                f" --{name.replace('_', '-')} {lower} or {lower + patch}"
            )
    if recipe.cut != "auto" and recipe.fine_tune != "last_blocks":
        return (
            f"cut={recipe.cut} needs fine_tune=last_blocks; received fine_tune={recipe.fine_tune}:"
            " use --fine-tune last_blocks, or --cut auto"
        )
    return ""


# The height and width, in pixels, of the squares that vision transformers cut an image into.
PATCH_SIZES: dict[str, int] = {
    "dinov2-small": 14,
    "dinov2-base": 14,
    "dinov2-small-registers": 14,
    "dinov2-base-registers": 14,
    "siglip2-base": 16,
    "vit-base": 16,
}

# Each returns what is wrong, or "".
_RULES = (
    _check_validation,
    _check_features,
    _check_head,
    _check_loss,
    _check_optimizer,
    _check_sizes,
)


def check_value(each: Field[Any], value: Any) -> None:
    """Raise a UserError unless the field of Recipe takes the value."""
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
# Not a notebook either. A better backbone, at the size that its features need, and a head that is
# solved for instead of trained in epochs. 75 % on 6,000 photographs, in four minutes on two CPU
# cores, where v5 has 62 %: `har run --variant v6 --data DIR` (docs/results.md).
V6 = replace(
    V5,
    backbone="efficientnet-lite2",
    image_size=416,
    augmentation="mirror",
    feature_views=2,
    head="linear_probe",
    test_time="mirror",
    calibration="temperature",
)
# The last blocks of the backbone are trained too, on views that passed the blocks before them once.
# Five views and epochs take half the time, and validation images cannot tell them apart from these;
# other photographs could.
V7 = replace(
    V6,
    image_size=260,
    evaluation_size=320,
    validation_fraction=0.1,
    augmentation="crop_flip_color",
    feature_views=8,
    fine_tune="last_blocks",
    head="gap_dropout",
    head_start="linear_probe",
    loss="categorical_crossentropy",
    label_smoothing=0.1,
    optimizer="adamw",
    learning_rate=7e-4,
    schedule="cosine",
    warmup_epochs=0.5,
    weight_decay=0.02,
    ema_momentum=0.995,
    epochs=10,
    patience=0,
    checkpoint="last",
)
VARIANTS = {
    "original": ORIGINAL,
    "v1": V1,
    "v2": V2,
    "v3": V3,
    "v4": V4,
    "v5": V5,
    "v6": V6,
    "v7": V7,
}
# The height and width, in pixels, of the images that these backbones were trained for.
NATIVE_SIZES: dict[str, int] = {
    "efficientnetv2-b0": 224,
    "efficientnetv2-b1": 240,
    "efficientnetv2-b2": 260,
    "efficientnetv2-b3": 300,
    "efficientnetv2-s": 384,
    "efficientnetv2-m": 480,
    "efficientnetv2-l": 480,
    "convnext-tiny": 224,
    "convnext-small": 224,
    "convnext-base": 224,
    "convnext-large": 224,
    "mobilenetv3-large": 224,
    "resnet50v2": 224,
    # trained at 518 px too, but its authors' linear classifiers take 224
    "dinov2-small": 224,
    "dinov2-base": 224,
    "dinov2-small-registers": 224,
    "dinov2-base-registers": 224,
    "siglip2-base": 224,
    "vit-base": 224,
}
# The variants that take them. The others have the notebooks' size, whatever the backbone.
NATIVELY_SIZED = ("v6", "v7")
# The pixels that become one in the last layer of all others of these, in each direction.
TOTAL_STRIDE = 32
# Images for evaluation are larger by this, as in v7 with its own backbone.
EVALUATION_RATIO = 1.2
# The fields that `har audit-labels` has as options: they decide which labels are in doubt.
AUDIT_FIELDS = ("resize", "image_size", "backbone", "weights", "class_weight", "precision", "seed")


def build_recipe(variant: str, overrides: Mapping[str, Any]) -> Recipe:
    """Change a variant by the user's values. If they name a backbone of NATIVE_SIZES and no size,
    v6 and v7 take images of that backbone's size.
    """
    return replace(VARIANTS[variant], **(_choose_sizes(variant, overrides) | dict(overrides)))


def _choose_sizes(variant: str, overrides: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes that follow from the backbone; {} if the variant or the user says them."""
    backbone = overrides.get("backbone", "")
    size = NATIVE_SIZES.get(backbone)
    given = {"image_size", "evaluation_size"} & set(overrides)
    if size is None or given or variant not in NATIVELY_SIZED:
        return {}
    if not VARIANTS[variant].evaluation_size:
        return {"image_size": size}
    stride = PATCH_SIZES.get(backbone, TOTAL_STRIDE)
    larger = stride * round(EVALUATION_RATIO * size / stride)
    return {"image_size": size, "evaluation_size": larger}


# What only epochs of training use: a head that is solved for has none.
EPOCH_FIELDS = (
    "mixing", "loss", "batch_size", "label_smoothing", "optimizer", "learning_rate", "schedule",
    "warmup_epochs", "weight_decay", "global_clipnorm", "ema_momentum", "epochs", "patience",
    "checkpoint",
)  # fmt: skip


def find_unused_fields(recipe: Recipe) -> tuple[str, ...]:
    """Return the fields that change nothing in the training of this recipe."""
    unused = EPOCH_FIELDS if recipe.solved else ()
    return unused if recipe.augmentation == "crop_flip_color" else (*unused, "crop_area")


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
