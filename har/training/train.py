"""`train(recipe, manifest)` returns a `Result`. Nothing here knows who watches or records."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from har.data.manifest import Manifest
from har.inference.freezing import compute_float32_in_full
from har.models.build import build_float32_copy, build_head, build_model, copy_head, find_backbone
from har.models.devices import STRATEGIES, make_deterministic
from har.recipe import Recipe
from har.training.features import extract_splits
from har.training.loaders import (
    Splits,
    build_feature_training_dataset,
    build_feature_validation_dataset,
    build_training_dataset,
    build_validation_dataset,
    count_steps,
    name_bad_images,
    split_training,
)
from har.training.state import State, Stopping, capture_state, restore_state
from har.util.errors import UserError
from har.util.progress import progress, say
from har.util.signals import defer_interrupts

# Called after each epoch with its number, from 1, and its metrics by logged name.
OnEpoch = Callable[[int, dict[str, float]], None]
# Called after each epoch, before OnEpoch, with a function that takes the state to go on from, and
# with whether that was the last epoch.
OnState = Callable[[Callable[[], State], bool], None]


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """Of a training on features: those of the test split, (images, features) float32, computed
    as the model itself computes them; how; in how many seconds; whether some were in the cache, and
    how many seconds those had taken when they were computed. `converted` is the backbone as the
    runtime computed it, if that is not Keras'.
    """

    test_features: npt.NDArray[np.float32]
    runtime: str
    arithmetic: str
    cache: str
    seconds: float
    saved_s: float
    converted: Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training leaves behind.

    `model` is float32 on one device, with the weights that `recipe.checkpoint` keeps; `extracted`
    is what the loader features leaves behind, and None for the others;
    `history` has one dict of metrics an epoch; `best_epoch` counts from 1 and is None
    where there was nothing to validate on.
    """

    recipe: Recipe
    model: keras.Model
    class_names: tuple[str, ...]
    history: list[dict[str, float]]
    train_images: int
    validation_images: int
    train_time_s: float
    extracted: Extracted | None = None

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the highest validation accuracy, the first of equals."""
        accuracies = [epoch.get("val_accuracy") for epoch in self.history]
        known = [value for value in accuracies if value is not None]
        return accuracies.index(max(known)) + 1 if known else None


@dataclass(frozen=True, kw_only=True)
class FitInputs:
    """What `fit` is given, and how the whole model is had from `learner` afterwards."""

    learner: keras.Model
    train_data: Any
    validation_data: Any
    finish: Callable[[], keras.Model]
    extracted: Extracted | None = None


def build_image_inputs(
    recipe: Recipe, manifest: Manifest, splits: Splits, runtime: str, first_epoch: int
) -> FitInputs:
    """Every image through the whole model, every epoch: what the notebooks do."""
    strategy, classes = STRATEGIES[recipe.strategy](), len(manifest.class_names)
    replicas = strategy.num_replicas_in_sync
    train_data = build_training_dataset(manifest, splits.train, recipe, first_epoch)
    validation_data = build_validation_dataset(manifest, splits.validation, recipe, replicas)
    with strategy.scope():
        model = build_model(recipe, classes)

    def finish() -> keras.Model:
        plain = recipe.precision == "float32" and replicas == 1
        return model if plain else build_float32_copy(model, recipe, classes)

    return FitInputs(
        learner=model, train_data=train_data, validation_data=validation_data, finish=finish
    )


def build_feature_inputs(
    recipe: Recipe, manifest: Manifest, splits: Splits, runtime: str, first_epoch: int
) -> FitInputs:
    """The frozen backbone once over every image, by `runtime`; the head learns from its output.

    The head starts from the weights that it would have in the whole model, and sees the same
    images in the same order.
    """
    strategy, classes = STRATEGIES[recipe.strategy](), len(manifest.class_names)
    replicas = strategy.num_replicas_in_sync
    model = build_model(replace(recipe, precision="float32"), classes)
    started = time.monotonic()
    found = extract_splits(find_backbone(model), manifest, recipe, runtime, splits)
    seconds = time.monotonic() - started
    # one replica needs no strategy, which would cost more than a step of so small a model
    with strategy.scope() if replicas > 1 else nullcontext():
        # An epoch without a line of Python in between; on several devices Keras 3.15 cannot.
        steps = count_steps(len(splits.train), recipe) if replicas == 1 else 1
        head = build_head(recipe, found.test.shape[-1], classes, steps_per_execution=steps)
    copy_head(model, head)
    train_data = build_feature_training_dataset(
        found.train, manifest, splits.train, recipe, first_epoch
    )

    def finish() -> keras.Model:
        copy_head(model, head, back=True)
        return model

    return FitInputs(
        learner=head,
        train_data=train_data,
        validation_data=build_feature_validation_dataset(
            found.validation, manifest, splits.validation, recipe, replicas
        ),
        finish=finish,
        extracted=Extracted(
            test_features=found.test,
            runtime=runtime,
            arithmetic=found.arithmetic,
            cache=found.cache,
            seconds=seconds,
            saved_s=found.saved_s,
            converted=found.converted,
        ),
    )


# Each value of the recipe's axis `loader`.
FIT_INPUTS: dict[str, Callable[[Recipe, Manifest, Splits, str, int], FitInputs]] = {
    "memory": build_image_inputs,
    "stream": build_image_inputs,
    "features": build_feature_inputs,
}


def train(
    recipe: Recipe,
    manifest: Manifest,
    callbacks: Sequence[OnEpoch] = (),
    runtime: str = "tensorflow",
    resume_from: State | None = None,
    on_state: OnState = lambda take, last: None,
) -> Result:
    """Train `recipe` on the manifest's train split; `runtime` computes features, if any.

    It resumes from `resume_from`, and hands out the state after each epoch by `on_state`: on a CPU
    a resumed training gives the same numbers as one that never stopped.

    The seed fixes weights, order, augmentation and dropout: on a CPU a repeated training gives
    the same numbers. On GPUs sums may be taken in another order.

    Raises:
        UserError: too few images, weights that cannot be had, or a batch that does not
            divide evenly over the devices.
    """
    make_deterministic()
    compute_float32_in_full()
    keras.utils.set_random_seed(recipe.seed)
    splits = split_training(manifest, recipe)
    _check_batch(recipe, STRATEGIES[recipe.strategy]().num_replicas_in_sync)
    # decoding into memory and extraction are part of training, or the loaders could not be compared
    started = time.monotonic() - (resume_from.train_time_s if resume_from else 0.0)
    first_epoch = resume_from.first_epoch(recipe) if resume_from else 0
    with _explain_errors(manifest):
        inputs = FIT_INPUTS[recipe.loader](recipe, manifest, splits, runtime, first_epoch)
        steps = count_steps(len(splits.train), recipe)
        history = _run_epochs(inputs, recipe, steps, callbacks, resume_from, on_state, started)
    train_time_s = time.monotonic() - started
    return Result(
        recipe=recipe,
        model=inputs.finish(),
        class_names=manifest.class_names,
        history=history,
        train_images=len(splits.train),
        validation_images=len(splits.validation),
        train_time_s=train_time_s,
        extracted=inputs.extracted,
    )


@contextmanager
def _explain_errors(manifest: Manifest) -> Iterator[None]:
    """TensorFlow's errors of memory and of images, as what the user can do about them."""
    try:
        with name_bad_images(manifest):
            yield
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            "out of memory before the first epoch: a smaller --backbone or --image-size needs less"
        ) from error


def _run_epochs(
    inputs: FitInputs,
    recipe: Recipe,
    steps: int,
    callbacks: Sequence[OnEpoch],
    resume_from: State | None,
    on_state: OnState,
    started: float,
) -> list[dict[str, float]]:
    """The epochs that are left, of so many steps each; the whole history."""
    stopping = build_stopping(recipe, resume_from)
    if resume_from is not None:
        restore_state(inputs.learner, resume_from)

    def keep(history: Sequence[dict[str, float]], last: bool) -> None:
        seconds = time.monotonic() - started
        on_state(lambda: capture_state(inputs.learner, stopping, history, seconds), last)

    with defer_interrupts() as checkpoint:
        report = EpochReport(recipe, steps, callbacks, checkpoint, keep)
        report.history += resume_from.history if resume_from else []
        try:
            fit(inputs, report, stopping, resume_from.first_epoch(recipe) if resume_from else 0)
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(_advise_on_memory(inputs, recipe, checkpoint)) from error
        checkpoint()
    return report.history


def _advise_on_memory(inputs: FitInputs, recipe: Recipe, checkpoint: Callable[[], None]) -> str:
    """What to do about too little memory, found by trying a step of smaller batches."""
    problem = f"out of memory with batch_size {recipe.batch_size} at {recipe.image_size} px"
    if inputs.learner.jit_compile:
        # XLA's step has given the weights' memory away: the next may abort the process (2.21)
        return f"{problem}: try --batch-size {max(1, recipe.batch_size // 2)}"
    say(f"{problem}: trying smaller ones")
    replicas = inputs.learner.distribute_strategy.num_replicas_in_sync
    images, labels = next(iter(inputs.train_data))
    size = recipe.batch_size
    # a half at a time, each a multiple of the devices
    while (size := size // 2 // replicas * replicas) > 0:
        checkpoint()
        try:
            # every device takes all of what it is given here
            inputs.learner.train_on_batch(images[: size // replicas], labels[: size // replicas])
        except tf.errors.ResourceExhaustedError:
            continue
        return f"{problem}: --batch-size {size} fits"
    return f"{problem}, and with any smaller: take a smaller --backbone or --image-size"


def fit(
    inputs: FitInputs, report: "EpochReport", stopping: Stopping | None, first_epoch: int
) -> None:
    """Keras' fit as every variant uses it; the progress bar is closed however it ends."""
    recipe = report.recipe
    if first_epoch == recipe.epochs:
        # it was cut short after its last epoch: the best one's weights are all that is missing
        if stopping is not None:
            stopping.set_model(inputs.learner)
            stopping.on_train_begin()
            stopping.on_train_end()
        return
    try:
        inputs.learner.fit(
            inputs.train_data,
            validation_data=inputs.validation_data,
            epochs=recipe.epochs,
            initial_epoch=first_epoch,
            steps_per_epoch=report.steps,
            # the report comes last: what it keeps is the state after the others
            callbacks=[*([stopping] if stopping else []), report],
            # the data set shuffles itself; Keras could only warn that it cannot
            shuffle=False,
            verbose=0,
        )
    finally:
        report.bar.close()


def _check_batch(recipe: Recipe, replicas: int) -> None:
    """Raise a UserError unless every replica gets as many images."""
    if recipe.batch_size % replicas:
        raise UserError(
            f"batch_size {recipe.batch_size} does not divide evenly over {replicas} devices"
        )


def build_stopping(recipe: Recipe, resume_from: State | None = None) -> Stopping | None:
    """Early stopping after `patience` epochs, and the best epoch's weights if kept."""
    if not recipe.patience and recipe.checkpoint == "last":
        return None
    return Stopping(recipe, resume_from)


class EpochReport(keras.callbacks.Callback):
    """Times each epoch, shows progress, and hands the metrics on under their logged names."""

    def __init__(
        self,
        recipe: Recipe,
        steps: int,
        listeners: Sequence[OnEpoch],
        checkpoint: Callable[[], None],
        keep: Callable[[Sequence[dict[str, float]], bool], None],
    ) -> None:
        """`steps` an epoch; `listeners` hear of each epoch; `checkpoint` may end it all; `keep` is
        called with the history before the listeners, and whether this is the last epoch.
        """
        super().__init__()
        self.recipe, self.steps, self.listeners = recipe, steps, listeners
        self.checkpoint, self.keep = checkpoint, keep
        self.bar = ExitStack()
        self.history: list[dict[str, float]] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the clock and the bar."""
        self.started = time.monotonic()
        self.validation_s, self.done = 0.0, 0
        label = f"epoch {epoch + 1}/{self.recipe.epochs}"
        self.advance = self.bar.enter_context(progress(label, self.steps, brief=True))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """`batch` is the last one done; there may be several between two calls."""
        self.advance(batch + 1 - self.done)
        self.done = batch + 1
        self.checkpoint()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Validation can be stopped too."""
        self.checkpoint()

    def on_test_begin(self, logs: Any = None) -> None:
        """Validation starts."""
        self.validation_started = time.monotonic()

    def on_test_end(self, logs: Any = None) -> None:
        """Validation ended: its time is no training time."""
        self.validation_s = time.monotonic() - self.validation_started

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Rename, time, tell."""
        self.bar.close()
        epoch_time_s = time.monotonic() - self.started
        metrics = {_logged_name(name): float(value) for name, value in (logs or {}).items()}
        metrics["epoch_time_s"] = epoch_time_s
        images = self.steps * self.recipe.batch_size
        metrics["images_per_second"] = images / (epoch_time_s - self.validation_s)
        self.history.append(metrics)
        self.keep(self.history, self.model.stop_training or epoch + 1 == self.recipe.epochs)
        say(describe_epoch(epoch + 1, self.recipe.epochs, metrics))
        for listener in self.listeners:
            listener(epoch + 1, metrics)


def _logged_name(keras_name: str) -> str:
    """Keras' `accuracy` is the training split's here; its `val_` names stay."""
    return keras_name if keras_name.startswith("val_") else f"train_{keras_name}"


def describe_epoch(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """One line of at most 80 characters."""
    validation = (
        f"  val {metrics['val_loss']:.3f} {metrics['val_accuracy']:.3f}"
        if "val_loss" in metrics
        else ""
    )
    return (
        f"epoch {epoch}/{epochs}"
        f"  loss {metrics['train_loss']:.3f} acc {metrics['train_accuracy']:.3f}{validation}"
        f"  {metrics['epoch_time_s']:.1f} s  {metrics['images_per_second']:.0f} images/s"
    )
