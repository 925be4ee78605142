"""Trials of a search: each a training that knows no test image, judged by validation images.

Trials on features of a frozen backbone run in one process, which keeps the features; others each in
a process of its own.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import keras
import mlflow
import tensorflow as tf
from mlflow.entities import Metric as LoggedMetric

from har.data.manifest import Manifest, hide_test
from har.jobs.children import (
    KilledFromOutside,
    build_key,
    call_on_cluster,
    find_finished,
    in_own_process,
)
from har.recipe import Recipe, build_recipe, digest_recipe, find_unused_fields
from har.search.space import Choice, Space, find_start
from har.search.study import (
    ERROR,
    REPEATED,
    Metric,
    Progress,
    Search,
    TrialFailed,
    is_interrupted,
)
from har.tracking.store import explain_store_errors
from har.tracking.trials import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    PRUNED,
    STATE_TAG,
    TrialRun,
    load_epochs,
    start_trial,
)
from har.training.frozen import FrozenFeatures
from har.training.job import TrainingJob, build_job
from har.training.train import find_best_epoch, train
from har.util.errors import UserError, first_line
from har.util.progress import only_progress, say, warn
from har.util.ray_cluster import Cluster, count_devices

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial

# The run that a trial is recorded in, among the trial's attributes.
RUN_ID = "run_id"
# The searched fields that change nothing in it, likewise.
UNUSED = "unused"
# The share of the epochs in which no trial is pruned: small learning rates start slowly.
SPARED_SHARE = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A search through `space`, around a variant changed by `overrides`.

    It is over after `trials` trials, those of earlier commands included. `pruning` is `median` or
    `none`. `given` are the other options that the user gave, by name; `process` names this command
    among those that share the search.
    """

    variant: str
    overrides: dict[str, Any]
    space: Space
    trials: int
    metric: Metric
    pruning: str
    storage: str
    manifest: Manifest
    runtime: str
    experiment: str
    given: dict[str, Any]
    process: str = field(default_factory=lambda: uuid4().hex)
    cluster: Cluster | None = None


def open_search(asked: Sweep, name: str) -> Search:
    """Open the search of this name."""
    recipe = build_recipe(asked.variant, asked.overrides)
    return Search(
        asked.storage,
        name,
        asked.space,
        asked.metric,
        seed=recipe.seed,
        spared=int(SPARED_SHARE * recipe.epochs),
        process=asked.process,
    )


def _stays_frozen(asked: Sweep) -> bool:
    """Return whether every trial trains on features of the frozen backbone."""
    recipe = build_recipe(asked.variant, asked.overrides)
    for name, wanted in (("loader", "features"), ("fine_tune", "frozen")):
        searched = asked.space.get(name)
        tried = searched.values if isinstance(searched, Choice) else (getattr(recipe, name),)
        if set(tried) != {wanted}:
            return False
    return True


def run_missing_trials(asked: Sweep, search: Search, parent: str) -> Progress:
    """Run trials until the search has as many as it should, other processes' included."""
    while (progress := search.progress).done < asked.trials and not search.is_exhausted:
        if progress.done + progress.running >= asked.trials:
            say(f"waiting for {progress.running} trials of other processes")
            search.wait_for_others()
        elif asked.cluster is not None:
            _run_on_cluster(asked, asked.cluster, search, parent)
        elif _stays_frozen(asked):
            in_own_process(_run_trials, asked, search.name, parent)
        else:
            _run_one(asked, search, parent, partial(_evaluate_apart, asked, search, parent))
    return progress


def _run_trials(asked: Sweep, name: str, parent: str) -> None:
    """Run trials in this process, which keeps their features."""
    search, kept = open_search(asked, name), FrozenFeatures()
    # each trial traces its training step anew, which TensorFlow takes for a mistake
    tf.get_logger().setLevel("ERROR")
    while _needs_more(asked, search):
        _run_one(asked, search, parent, partial(_evaluate, asked, search, parent, kept))


def _run_on_cluster(asked: Sweep, cluster: Cluster, search: Search, parent: str) -> None:
    """Run trials on all devices of a cluster, each of which takes part in the search."""
    seen = {each.number for each in search.ended}
    before = len(seen)

    def report() -> None:
        for trial in sorted(search.ended, key=lambda each: each.number):
            if trial.number not in seen:
                seen.add(trial.number)
                seconds = trial.duration.total_seconds() if trial.duration else 0.0
                say(_format_trial(asked, search.progress, trial, seconds))

    missing = asked.trials - before
    devices = min(missing, count_devices(cluster))
    alone = replace(asked, cluster=None)
    calls = [(alone, search.name, parent)] * devices
    for _ in call_on_cluster(cluster, _run_share, calls, report):
        pass
    report()


def _run_share(asked: Sweep, name: str, parent: str) -> None:
    """Run trials until none is missing."""
    if _stays_frozen(asked):
        _run_trials(asked, name, parent)
        return
    search = open_search(asked, name)
    while _needs_more(asked, search):
        _run_one(asked, search, parent, partial(_evaluate_apart, asked, search, parent))


def _needs_more(asked: Sweep, search: Search) -> bool:
    progress = search.progress
    return progress.done + progress.running < asked.trials and not search.is_exhausted


def _run_one(asked: Sweep, search: Search, parent: str, evaluate: Any) -> None:
    """Run one trial, and report it."""
    started = time.monotonic()
    start = find_start(asked.space, asked.overrides, asked.variant)
    trial = search.run_trial(evaluate, start)
    if REPEATED in trial.user_attrs:
        return
    if is_interrupted(trial):
        warn(f"trial {trial.number} was taken for dead by another process, and is tried again")
        return
    progress = search.progress
    say(_format_trial(asked, progress, trial, time.monotonic() - started))
    if progress.best is not None:
        at_ms = int(1000 * time.time())
        value = LoggedMetric(f"best_{asked.metric}", progress.best.value, at_ms, progress.done)
        with explain_store_errors():
            mlflow.MlflowClient().log_batch(parent, [value])


def _format_trial(asked: Sweep, progress: Progress, trial: "FrozenTrial", seconds: float) -> str:
    values = ", ".join(f"{name}={format_value(v)}" for name, v in list_values(trial).items())
    state = trial.state.name.lower()
    if ERROR in trial.user_attrs:
        result = f"failed: {trial.user_attrs[ERROR]}"
    elif state == "pruned":
        result = f"pruned after epoch {trial.last_step}, {asked.metric} {trial.value:.3f}"
    else:
        result = f"{asked.metric} {trial.value:.3f}"
    best = f", best {progress.best.value:.3f}" if progress.best else ""
    return f"trial {progress.done} of {asked.trials}: {result}  {values}  {seconds:.1f} s{best}"


def list_values(trial: "FrozenTrial") -> dict[str, Any]:
    """Return the values that a trial tried, without those that change nothing in it."""
    unused = trial.user_attrs.get(UNUSED, [])
    return {name: value for name, value in trial.params.items() if name not in unused}


def format_value(value: Any) -> str:
    """Format a value of a recipe field for people."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def choose_overrides(asked: Sweep, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all fields that differ from the variant, without those that change nothing: trials
    that differ in these alone are equal.
    """
    unused = find_unused_fields(build_recipe(asked.variant, {**asked.overrides, **values}))
    return asked.overrides | {name: v for name, v in values.items() if name not in unused}


def _evaluate(
    asked: Sweep,
    search: Search,
    parent: str,
    kept: FrozenFeatures,
    trial: "Trial",
    values: dict[str, Any],
) -> float:
    """Return the score of the recipe with these values, from an equal training if there is one."""
    try:
        overrides = choose_overrides(asked, values)
        recipe = build_recipe(asked.variant, overrides)
        job = build_job(asked.variant, recipe, overrides, asked.manifest, asked.runtime, quiet=True)
    except UserError as error:
        start_trial(parent, search.name, trial.number, values, None).end(FAILED, error)
        raise _fail(trial, error) from error
    if not search.claim(trial, digest_recipe(recipe)):
        raise TrialFailed("another trial has the same recipe")
    trial.set_user_attr(UNUSED, sorted(set(values) - set(overrides)))
    if (score := _find_score(asked, trial, job)) is not None:
        return score
    run = start_trial(parent, search.name, trial.number, values, job)
    trial.set_user_attr(RUN_ID, run.id)
    return _train_trial(asked, kept, trial, job, run)


def _evaluate_apart(
    asked: Sweep, search: Search, parent: str, trial: "Trial", values: dict[str, Any]
) -> float:
    """Evaluate in a new process, which gives all its memory back."""
    number = trial._trial_id
    try:
        return in_own_process(_evaluate_trial, asked, search.name, parent, number, values)
    except KilledFromOutside as error:
        raise _fail(trial, error) from error


def _evaluate_trial(
    asked: Sweep, name: str, parent: str, trial_id: int, values: dict[str, Any]
) -> float:
    search = open_search(asked, name)
    trial = search.load_trial(trial_id)
    return _evaluate(asked, search, parent, FrozenFeatures(), trial, values)


def _fail(trial: "Trial", error: Exception) -> TrialFailed:
    trial.set_user_attr(ERROR, first_line(error)[:1000])
    return TrialFailed(first_line(error))


def _find_score(asked: Sweep, trial: "Trial", job: TrainingJob) -> float | None:
    """Find the score of an equal trial or training; None if there is none."""
    key = build_key(job)
    found = find_finished(
        key, asked.runtime, asked.experiment, job="trial", **{STATE_TAG: COMPLETE}
    )
    found += find_finished(key, asked.runtime, asked.experiment, job="train")
    for run in found:
        epochs = load_epochs(run.info.run_id, tuple({"val_accuracy", asked.metric}))
        if epochs and all(asked.metric in each for each in epochs):
            for number, each in enumerate(epochs, start=1):
                trial.report(each[asked.metric], number)
            trial.set_user_attr(RUN_ID, run.info.run_id)
            return find_score(job.used, epochs, asked.metric)
    return None


def find_score(recipe: Recipe, history: list[dict[str, float]], metric: str) -> float:
    """Return the metric of the epoch whose weights the model keeps."""
    best = find_best_epoch(recipe, history)
    return history[-1 if best is None else best - 1][metric]


def _train_trial(
    asked: Sweep, kept: FrozenFeatures, trial: "Trial", job: TrainingJob, run: TrialRun
) -> float:
    from optuna import TrialPruned

    hidden = replace(job, manifest=hide_test(job.manifest))
    try:
        with only_progress(), run.open_epoch_log() as log:

            def on_epoch(epoch: int, metrics: dict[str, float]) -> None:
                log(epoch, metrics)
                trial.report(metrics[asked.metric], epoch)
                if asked.pruning == "median" and trial.should_prune():
                    raise TrialPruned

            result = train(hidden, on_epoch=on_epoch, kept=kept)
    except TrialPruned:
        run.end(PRUNED)
        raise
    except KeyboardInterrupt:
        run.end(INTERRUPTED)
        raise
    # whatever goes wrong in one trial, the search goes on
    except Exception as error:
        run.end(FAILED, error)
        raise _fail(trial, error) from error
    finally:
        # what Keras remembers of this trial's networks; Python frees them when it is time
        keras.backend.clear_session(free_memory=False)
    run.end(COMPLETE)
    return find_score(result.recipe, result.history, asked.metric)
