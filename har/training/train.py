"""`train(job)` returns a `Result`: a trained Keras model and its history. It knows no MLflow."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from har.data.manifest import Manifest
from har.models.build import copy_head, set_output_layer
from har.models.served import build_float32_copy, build_served
from har.recipe import Recipe
from har.training.audit import leave_out_suspects, make_repeatable
from har.training.backup import Backup
from har.training.bad_images import name_bad_images
from har.training.calibration import fit_temperature
from har.training.epoch_report import EpochReport, OnEpoch, describe_end
from har.training.features import Extracted, FeatureSplits
from har.training.frozen import FrozenFeatures
from har.training.inputs import FitInputs, build_inputs, split_job
from har.training.job import TrainingJob
from har.training.loaders import Splits, count_steps, weigh_classes
from har.training.probe import Probe, apply_root, describe_probe, report_probe, solve
from har.training.state import State, Stopping, capture_state, restore_state
from har.util.errors import UserError
from har.util.progress import say
from har.util.signals import defer_interrupts


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training.

    `model` is float32 on one device, with the weights that `recipe.checkpoint` keeps; `served` is
    what to log. `suspects` were left out of the `train_images`. `history` has one dict of metrics
    for each epoch. `features` are those of the loader features. `probe` is the solved head, if it
    was solved.
    """

    recipe: Recipe
    model: keras.Model
    class_names: tuple[str, ...]
    history: list[dict[str, float]]
    train_images: int
    validation_images: int
    suspects: int
    train_time_s: float
    temperature: float = 1.0
    features: FeatureSplits | None = None
    probe: Probe | None = None

    @property
    def extracted(self) -> Extracted | None:
        """The way features were computed, if they were."""
        return self.features.extracted if self.features else None

    @property
    def served(self) -> keras.Model:
        """The model with what it does beside the training's: mirror images, temperature."""
        return build_served(self.model, self.recipe, self.temperature)

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights the model keeps, from 1; None if that is just the last."""
        return find_best_epoch(self.recipe, self.history)


def find_best_epoch(recipe: Recipe, history: list[dict[str, float]]) -> int | None:
    """Return the first epoch with the highest validation accuracy, from 1; None if the model keeps
    the weights of the last epoch anyway.
    """
    if recipe.checkpoint == "last":
        return None
    accuracies = [epoch["val_accuracy"] for epoch in history if "val_accuracy" in epoch]
    return accuracies.index(max(accuracies)) + 1 if accuracies else None


def train(
    job: TrainingJob,
    *,
    on_epoch: OnEpoch | None = None,
    backup: Backup | None = None,
    kept: FrozenFeatures | None = None,
) -> Result:
    """Train `job.used` on the train split of `job.manifest`.

    `on_epoch` is called after each epoch. A training resumes from the state in `backup`, and saves
    its state there. On a CPU the seed fixes every number, also those of a resumed training; on GPUs
    sums may be taken in another order. Trainings with the same `kept` share frozen features.

    Raises:
        UserError: too few images, weights that cannot be had, too little memory, an image that is
            gone or changed, or a batch that does not divide evenly over the devices.
    """
    make_repeatable(job.used.seed)
    splits = split_job(job)
    # decoding and extraction count as training, or the loaders could not be compared
    images, started = len(splits.train), time.monotonic()
    state = backup.state if backup else None
    first_epoch = state.first_epoch(job.used) if state else 0
    with _explain_errors(job.manifest):
        splits = leave_out_suspects(job, splits)
        inputs = build_inputs(job, splits, first_epoch, kept)
        find = _solve_head if job.used.solved else _run_epochs
        probe, history, seconds = find(inputs, job, splits, on_epoch, backup, started)
        temperature = _fit_temperature(inputs, job.used, splits, probe)
    train_images = len(splits.train) if probe is None else int(probe.kept.sum())
    return Result(
        recipe=job.used,
        model=_finish(inputs, job),
        class_names=job.manifest.class_names,
        history=history,
        train_images=train_images,
        validation_images=len(splits.validation),
        suspects=images - train_images,
        train_time_s=seconds,
        temperature=temperature,
        features=inputs.features,
        probe=probe,
    )


def _solve_head(
    inputs: FitInputs,
    job: TrainingJob,
    splits: Splits,
    on_epoch: OnEpoch | None,
    backup: Backup | None,
    started: float,
) -> tuple[Probe, list[dict[str, float]], float]:
    """Solve for the output layer; return it, what one epoch would report, and the seconds of
    training since `started`.

    A resumed training solves again, which gives the same layer, and keeps what it had reported.
    """
    found, rows = inputs.features, splits.train
    # a head that is solved for needs all features at once
    assert found is not None and isinstance(found.train, np.ndarray)
    solving = time.monotonic()
    with defer_interrupts() as checkpoint:
        train_views, views = (apply_root(each) for each in (found.train, found.validation))
        probe = solve(train_views, views, rows, len(job.manifest.class_names), job.used, checkpoint)
    set_output_layer(inputs.learner, probe.layer.kernel, probe.layer.bias)
    if backup and backup.state:
        return probe, backup.state.history, backup.state.train_time_s
    metrics = report_probe(probe, train_views, rows, time.monotonic() - solving)
    say(describe_probe(probe, metrics))
    train_time_s = time.monotonic() - started
    if backup is not None:
        # without a state the backup would be deleted with the first error
        backup.save(capture_state(inputs.learner, None, [metrics], train_time_s))
    if on_epoch is not None:
        on_epoch(1, metrics)
    return probe, [metrics], train_time_s


def _fit_temperature(
    inputs: FitInputs, recipe: Recipe, splits: Splits, probe: Probe | None
) -> float:
    """Fit the temperature on what the finished model says of the validation images; 1 without."""
    if recipe.calibration == "none":
        return 1.0
    labels = splits.validation["label_id"].to_numpy()
    if probe is not None and probe.probabilities is not None:
        return fit_temperature(probe.probabilities, labels)
    if inputs.features is not None:
        views = inputs.features.validation
        found = np.mean(
            [inputs.learner.predict(each.astype(np.float32), verbose=0) for each in views], axis=0
        )
    else:
        served = build_served(inputs.model, recipe, 1.0)
        found = served.predict(inputs.validation_data.map(lambda images, _: images), verbose=0)
    return fit_temperature(found, labels)


def _finish(inputs: FitInputs, job: TrainingJob) -> keras.Model:
    """Return the whole trained model, in float32 on one device, for images of one size."""
    recipe = job.used
    if recipe.loader == "features" and recipe.fine_tune == "frozen":
        copy_head(inputs.model, inputs.learner, back=True)
        if recipe.served_size == recipe.image_size:
            return inputs.model
    elif (
        recipe.precision == "float32"
        and job.replicas == 1
        and recipe.served_size == recipe.image_size
    ):
        return inputs.model
    return build_float32_copy(inputs.model, recipe, len(job.manifest.class_names))


@contextmanager
def _explain_errors(manifest: Manifest) -> Iterator[None]:
    try:
        with name_bad_images(manifest):
            yield
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            "out of memory before the first epoch: a smaller --backbone or --image-size needs less"
        ) from error


def _run_epochs(
    inputs: FitInputs,
    job: TrainingJob,
    splits: Splits,
    on_epoch: OnEpoch | None,
    backup: Backup | None,
    started: float,
) -> tuple[None, list[dict[str, float]], float]:
    """Run the epochs that are left, and say how that ended; return what `_solve_head` returns."""
    state, recipe = backup.state if backup else None, job.used
    stopping = build_stopping(recipe, state)
    weights = weigh_classes(splits.train, recipe, len(job.manifest.class_names))
    if state is not None:
        restore_state(inputs.learner, state)
    with defer_interrupts() as checkpoint:
        report = EpochReport(
            recipe,
            count_steps(len(splits.train), recipe),
            checkpoint,
            started=started,
            stopping=stopping,
            resume_from=state,
            on_epoch=on_epoch,
            backup=backup,
        )
        try:
            fit(inputs, report, stopping, state.first_epoch(recipe) if state else 0, weights)
        except tf.errors.ResourceExhaustedError as error:
            raise UserError(_advise_on_memory(inputs, recipe, checkpoint)) from error
        checkpoint()
    say(describe_end(recipe, report.history, find_best_epoch(recipe, report.history)))
    return None, report.history, report.train_time_s


def _advise_on_memory(inputs: FitInputs, recipe: Recipe, checkpoint: Callable[[], None]) -> str:
    """Find a batch size that fits, by trying a step of smaller and smaller batches."""
    problem = f"out of memory with batch_size {recipe.batch_size} at {recipe.image_size} px"
    if inputs.learner.jit_compile:
        # XLA's step has given the weights' memory away: the next may abort the process (2.21)
        return f"{problem}: try --batch-size {max(1, recipe.batch_size // 2)}"
    say(f"{problem}: trying smaller ones")
    replicas = inputs.learner.distribute_strategy.num_replicas_in_sync
    images, labels = next(iter(inputs.train_data))
    size = recipe.batch_size
    # half as many each time, rounded to a multiple of the devices
    while (size := size // 2 // replicas * replicas) > 0:
        checkpoint()
        try:
            # each device takes all images of this call
            inputs.learner.train_on_batch(images[: size // replicas], labels[: size // replicas])
        except tf.errors.ResourceExhaustedError:
            continue
        return f"{problem}: --batch-size {size} fits"
    return f"{problem}, and with every smaller one: take a smaller --backbone or --image-size"


def fit(
    inputs: FitInputs,
    report: EpochReport,
    stopping: Stopping | None,
    first_epoch: int,
    class_weight: dict[int, float] | None,
) -> None:
    """Call Keras' `fit` as every variant needs it."""
    recipe = report.recipe
    if first_epoch == recipe.epochs:
        # the earlier process ended after its last epoch: only the weights to keep are missing
        inputs.learner.optimizer.finalize_variable_values(inputs.learner.trainable_variables)
        if stopping is not None:
            stopping.set_model(inputs.learner)
            stopping.on_train_begin()
            stopping.on_train_end()
        return
    with inputs.learner.distribute_strategy.scope():
        # else the first step creates the optimizer's variables, and TensorFlow traces it twice
        inputs.learner.optimizer.build(inputs.learner.trainable_variables)
    # validation is of the averaged weights, which the model keeps in the end
    average = [keras.callbacks.SwapEMAWeights()] if recipe.ema_momentum else []
    try:
        inputs.learner.fit(
            inputs.train_data,
            validation_data=inputs.validation_data,
            epochs=recipe.epochs,
            initial_epoch=first_epoch,
            steps_per_epoch=report.steps,
            class_weight=class_weight,
            # the report comes last: it saves the state that the others leave
            callbacks=[*average, *([stopping] if stopping else []), report],
            # the data set shuffles itself; Keras could only warn that it cannot
            shuffle=False,
            verbose=0,
        )
    finally:
        report.bar.close()


def build_stopping(recipe: Recipe, resume_from: State | None = None) -> Stopping | None:
    """Build the callback that stops early and keeps the best weights; None if neither is asked."""
    if not recipe.patience and recipe.checkpoint == "last":
        return None
    return Stopping(recipe, resume_from)
