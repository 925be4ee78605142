"""The report of each epoch: progress, metrics, and the state saved after it."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import keras

from har.recipe import Recipe
from har.training.backup import Backup
from har.training.state import State, Stopping, capture_state
from har.util.errors import UserError
from har.util.progress import progress, say

# The first steps are slow, and a short training needs no estimate.
ESTIMATE_AFTER_S = 15.0
# A training loss this many times that of guessing, ln(classes), is no learning.
MAX_LOSS_OF_GUESSING = 20.0
# Called after each epoch with its number, from 1, and its metrics by logged name.
OnEpoch = Callable[[int, dict[str, float]], None]


class EpochReport(keras.callbacks.Callback):
    """Times each epoch, shows progress, saves the state, and passes the metrics on.

    `history` holds the metrics of each epoch under their logged names, those of `resume_from`
    first. `checkpoint()` is called between steps and may raise KeyboardInterrupt.
    """

    def __init__(
        self,
        recipe: Recipe,
        steps: int,
        checkpoint: Callable[[], None],
        *,
        started: float,
        stopping: Stopping | None = None,
        resume_from: State | None = None,
        on_epoch: OnEpoch | None = None,
        backup: Backup | None = None,
    ) -> None:
        """`steps` are those of one epoch; `started` is when training began, by time.monotonic()."""
        super().__init__()
        self.recipe, self.steps, self.checkpoint = recipe, steps, checkpoint
        self.stopping, self.on_epoch, self.backup = stopping, on_epoch, backup
        self.history = list(resume_from.history) if resume_from else []
        # earlier processes' training counts too
        self.train_started = started - (resume_from.train_time_s if resume_from else 0.0)
        self.bar = ExitStack()
        self.estimated = False

    @property
    def train_time_s(self) -> float:
        """Seconds of training so far, those of earlier processes included."""
        return time.monotonic() - self.train_started

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the clock and the bar."""
        self.started = time.monotonic()
        self.validation_s, self.done = 0.0, 0
        label = f"epoch {epoch + 1}/{self.recipe.epochs}"
        self.advance = self.bar.enter_context(progress(label, self.steps, brief=True))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Advance the bar; Keras may run several batches between two calls."""
        self.advance(batch + 1 - self.done)
        self.done = batch + 1
        self.checkpoint()
        if not self.estimated and time.monotonic() - self.started > ESTIMATE_AFTER_S:
            self._say_estimate()

    def _say_estimate(self) -> None:
        """Say once how long the epochs that are left will take."""
        self.estimated = True
        step_s = (time.monotonic() - self.started) / self.done
        epochs = self.recipe.epochs - len(self.history)
        minutes = step_s * self.steps * epochs / 60
        sooner = ", sooner with early stopping" if self.recipe.patience else ""
        say(f"about {minutes:,.0f} min for {epochs} epochs{sooner}")

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Let Ctrl-C stop validation too."""
        self.checkpoint()

    def on_test_begin(self, logs: Any = None) -> None:
        """Start the clock of validation."""
        self.validation_started = time.monotonic()

    def on_test_end(self, logs: Any = None) -> None:
        """Stop the clock of validation, which does not count as training."""
        self.validation_s = time.monotonic() - self.validation_started

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Record the metrics, save the state, and pass the metrics on."""
        self.bar.close()
        epoch_time_s = time.monotonic() - self.started
        metrics = {_logged_name(name): float(value) for name, value in (logs or {}).items()}
        metrics["epoch_time_s"] = epoch_time_s
        if problem := find_divergence(metrics, self.model.output_shape[-1], self.recipe):
            if self.backup is not None:
                self.backup.useless = True
            raise UserError(f"the training diverged in epoch {epoch + 1}: {problem}")
        images = self.steps * self.recipe.batch_size
        metrics["images_per_second"] = images / (epoch_time_s - self.validation_s)
        self.history.append(metrics)
        last = self.model.stop_training or epoch + 1 == self.recipe.epochs
        if self.backup is not None and self.backup.is_due(last):
            state = capture_state(self.model, self.stopping, self.history, self.train_time_s)
            self.backup.save(state)
        say(describe_epoch(epoch + 1, self.recipe.epochs, metrics))
        if self.on_epoch is not None:
            self.on_epoch(epoch + 1, metrics)


def find_divergence(metrics: dict[str, float], classes: int, recipe: Recipe) -> str:
    """Say which loss of an epoch is not finite, or that the training loss is far above that of
    guessing, and what to lower; "" if all is well.
    """
    guessing = math.log(max(classes, 2))
    bounds = {"train_loss": MAX_LOSS_OF_GUESSING * guessing, "val_loss": math.inf}
    bad = [
        f"{name} is {value:,.4g}"
        for name, value in metrics.items()
        if name in bounds and not (math.isfinite(value) and value <= bounds[name])
    ]
    if not bad:
        return ""
    half = recipe.precision == "mixed_float16"
    more = ", or use --precision float32" if half else ""
    return (
        f"{' and '.join(bad)}, while guessing has {guessing:.1f}; lower --learning-rate (now"
        f" {recipe.learning_rate:g}), for example to {recipe.learning_rate / 10:g}{more}"
    )


def _logged_name(keras_name: str) -> str:
    # Keras' plain names are of the training split; here the plain `accuracy` is the test split's
    return keras_name if keras_name.startswith("val_") else f"train_{keras_name}"


def describe_epoch(epoch: int, epochs: int, metrics: dict[str, float]) -> str:
    """Describe an epoch in one line of at most 80 characters."""
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


def describe_end(recipe: Recipe, history: list[dict[str, float]], best_epoch: int | None) -> str:
    """Say why the last epoch was the last, and which epoch's weights the model keeps."""
    done = len(history)
    if done < recipe.epochs:
        why = f"early stopping after epoch {done}: no better val_accuracy in {recipe.patience}"
        why += " epochs"
    else:
        why = "all epochs done"
    if best_epoch is None or recipe.checkpoint == "last":
        return f"{why}; the model keeps the weights of the last epoch"
    best = history[best_epoch - 1]["val_accuracy"]
    return f"{why}; the model keeps the weights of epoch {best_epoch} (val_accuracy {best:.3f})"
