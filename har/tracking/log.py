"""Logs a training and an evaluation into an MLflow run."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import mlflow
from mlflow.entities import Metric

from har.data.manifest import Manifest
from har.evaluation import figures
from har.evaluation.evaluate import Evaluation, tabulate_by_duplicate
from har.evaluation.latency import Latency
from har.tracking.journal import open_journal
from har.tracking.preparation import build_dataset, log_manifest
from har.tracking.store import Run, short_timeouts
from har.tracking.tags import (
    HISTORY_ARTIFACT,
    RECIPE_ARTIFACT,
    recipe_fields,
    training_params,
)
from har.training.backup import Backup
from har.training.calibration import scale
from har.training.diagnostics import DIAGNOSTICS
from har.training.epoch_report import OnEpoch
from har.training.job import TrainingJob
from har.training.train import Result
from har.util.progress import say


def log_job(run: Run, job: TrainingJob) -> None:
    """Log the parameters, the data set and what the variant explores, before training starts."""
    with short_timeouts():
        run.log_params(training_params(job))
        run.log_dataset(build_dataset(job.manifest), "training")
    if exploration := DIAGNOSTICS[job.used.diagnostics](job.manifest, job.hardware):
        say(*exploration.split("\n"))
        mlflow.log_text(exploration, "exploration.txt")


@contextmanager
def open_epoch_log(run_id: str, backup: Backup) -> Iterator[OnEpoch]:
    """Yield the function that logs an epoch; training never waits for the store.

    When a run is resumed, the epochs in the backup that the run lacks are logged first. An epoch
    that the run already has is not logged again. Epochs count from 1 and are the step.
    """
    client = mlflow.MlflowClient()
    # around the whole training: MLflow's timeouts are settings of the process, not of a thread
    with short_timeouts():
        known = {each.step for each in client.get_metric_history(run_id, "epoch_time_s")}
        # a store ignores a metric that it gets a second time with the same timestamp
        with open_journal(lambda batch: client.log_batch(run_id, batch)) as add:

            def log_once(epoch: int, metrics: dict[str, float]) -> None:
                at_ms = int(1000 * time.time())
                if epoch not in known:
                    add([Metric(name, value, at_ms, epoch) for name, value in metrics.items()])

            for epoch, metrics in enumerate(backup.state.history if backup.state else [], start=1):
                log_once(epoch, metrics)
            yield log_once


def log_result(run: Run, job: TrainingJob, result: Result) -> None:
    """Log a finished training's numbers, recipe, history and curves."""
    metrics = {"train_time_s": result.train_time_s}
    if result.best_epoch is not None:
        best = result.history[result.best_epoch - 1]
        metrics |= {"best_epoch": result.best_epoch, "best_val_accuracy": best["val_accuracy"]}
    if (extracted := result.extracted) is not None:
        metrics["extraction_time_s"] = extracted.seconds
        metrics["saved_time_s"] = extracted.saved_s
        used = {"runtime": extracted.runtime, "arithmetic": extracted.arithmetic}
        run.log_params({f"used.feature_{name}": value for name, value in used.items()})
    if (probe := result.probe) is not None:
        metrics["probe_c"] = probe.c
        if not probe.grid.empty:
            run.log_table(lambda: probe.grid, "linear_probe.csv")
    if job.used.suspects != "keep":
        metrics["suspects"] = result.suspects
    if job.used.calibration != "none":
        metrics["temperature"] = result.temperature
    # after a cache hit the wall time is not the whole job's
    mlflow.set_tag("feature_cache", extracted.cache if extracted else "none")
    run.log_params(
        {"train_images": result.train_images, "validation_images": result.validation_images}
    )
    run.log_metrics(metrics)
    recipes = {"requested": recipe_fields(job.requested), "used": recipe_fields(job.used)}
    mlflow.log_dict({"variant": job.variant, **recipes}, RECIPE_ARTIFACT)
    mlflow.log_text(json.dumps(result.history, indent=1), HISTORY_ARTIFACT)
    run.log_figure(lambda: figures.draw_curves(result.history), "figures/learning_curves.png")
    log_manifest(job.manifest)


def _score_uncalibrated(evaluation: Evaluation, temperature: float) -> dict[str, float]:
    """Return the calibration error that the model would have without its temperature."""
    if temperature == 1:
        return {}
    before = replace(evaluation, probabilities=scale(evaluation.probabilities, 1 / temperature))
    return {"calibration_error_before": before.scores["calibration_error"]}


def log_evaluation(
    run: Run,
    evaluation: Evaluation,
    latency: Latency,
    manifest: Manifest,
    model_id: str | None,
    temperature: float = 1.0,
) -> None:
    """Log test scores, latency, tables and figures; link the scores to the model and the data.
    `temperature` is the one in the model.
    """
    dataset = build_dataset(manifest)
    run.log_metrics(_score_uncalibrated(evaluation, temperature))
    run.log_metrics(evaluation.scores | asdict(latency), model_id=model_id, dataset=dataset)
    tables: dict[str, Callable[[], Any]] = {
        "per_class": lambda: evaluation.per_class,
        "confusion": lambda: evaluation.confusion,
        "predictions": lambda: evaluation.predictions,
        "mistakes": lambda: evaluation.mistakes,
        "reliability": lambda: evaluation.reliability,
        "accuracy_by_duplicate": lambda: tabulate_by_duplicate(evaluation, manifest),
    }
    for name, build in tables.items():
        run.log_table(build, f"evaluation/{name}.csv")
    drawn: dict[str, Callable[[], Any]] = {
        "confusion_matrix": lambda: figures.draw_confusion(evaluation),
        "class_recall": lambda: figures.draw_class_intervals(evaluation),
        "reliability": lambda: figures.draw_reliability(evaluation),
        "mistakes": lambda: figures.draw_mistakes(evaluation, manifest.root),
    }
    for name, draw in drawn.items():
        run.log_figure(draw, f"figures/{name}.png")
