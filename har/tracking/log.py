"""What is written into MLflow runs: of data prepared, of a training, of an evaluation."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import mlflow
import mlflow.data.pandas_dataset
from mlflow.entities import Metric

from har.data.duplicates import describe_groups
from har.data.manifest import Manifest, format_manifest_files
from har.data.report import REPORT_FILE, draw_class_balance, draw_samples
from har.evaluation.evaluate import Evaluation, tabulate_by_duplicate
from har.evaluation.figures import (
    draw_class_intervals,
    draw_confusion,
    draw_curves,
    draw_mistakes,
    draw_reliability,
)
from har.evaluation.latency import Latency
from har.tracking.journal import open_journal
from har.tracking.store import (
    log_dataset,
    log_metrics_once,
    log_missing_metrics,
    log_missing_params,
    log_table_file,
    short_timeouts,
)
from har.tracking.tags import (
    HISTORY_ARTIFACT,
    RECIPE_ARTIFACT,
    count_images,
    split_params,
    training_params,
)
from har.training.job import TrainingJob
from har.training.train import OnEpoch, Result


def log_job(job: TrainingJob) -> None:
    """Parameters and the data set, before training starts."""
    log_missing_params(training_params(job))
    log_dataset(_build_dataset(job.manifest), "training")


def log_preparation(manifest: Manifest, report: str) -> None:
    """The data set, its split, counts, tables, pictures and the page `report`."""
    # counts are no metrics: those would stand among accuracies in the UI's charts
    log_missing_params({**split_params(manifest), **count_images(manifest)})
    log_dataset(_build_dataset(manifest), "preparation")
    _log_manifest(manifest)
    log_table_file(describe_groups(manifest.table), "duplicates.csv")
    mlflow.log_text(report, REPORT_FILE)
    mlflow.log_figure(draw_class_balance(manifest), "figures/class_balance.png")
    mlflow.log_figure(draw_samples(manifest), "figures/samples.png")


def _log_manifest(manifest: Manifest) -> None:
    """Both files of a prepared folder."""
    for name, text in format_manifest_files(manifest).items():
        mlflow.log_text(text, name)


def _build_dataset(manifest: Manifest) -> mlflow.data.pandas_dataset.PandasDataset:
    """The manifest as an MLflow data set under our own digest."""
    return mlflow.data.pandas_dataset.from_pandas(
        manifest.table,
        source=str(manifest.root),
        targets="label",
        name=manifest.name,
        digest=manifest.dataset_digest,
    )


def log_epoch(run_id: str, epoch: int, metrics: dict[str, float], at_ms: int) -> None:
    """One epoch's metrics; `epoch` counts from 1 and is the step. Again with the same time, a store
    takes it for the same.
    """
    batch = [Metric(name, value, at_ms, epoch) for name, value in metrics.items()]
    mlflow.MlflowClient().log_batch(run_id, batch)


@contextmanager
def open_epoch_log(run_id: str, history: Sequence[dict[str, float]]) -> Iterator[OnEpoch]:
    """Yield what logs an epoch while training runs on, whether or not the store answers.

    Of a resumed run, epochs of `history` that it lacks are logged first, and those
    that it has, and that are trained again, are not.
    """
    with short_timeouts():
        logged = mlflow.MlflowClient().get_metric_history(run_id, "epoch_time_s")
    known = {each.step for each in logged}

    def send(entry: tuple[int, dict[str, float], int]) -> None:
        with short_timeouts():
            log_epoch(run_id, *entry)

    with open_journal(send) as add:

        def log_once(epoch: int, metrics: dict[str, float]) -> None:
            if epoch not in known:
                add((epoch, metrics, int(1000 * time.time())))

        for epoch, metrics in enumerate(history, start=1):
            log_once(epoch, metrics)
        yield log_once


def log_result(job: TrainingJob, result: Result) -> None:
    """The numbers of a finished training, its recipe, history and curves."""
    times = {"train_time_s": result.train_time_s}
    if result.best_epoch is not None:
        best = result.history[result.best_epoch - 1]
        log_metrics_once(
            {"best_epoch": result.best_epoch, "best_val_accuracy": best["val_accuracy"]}
        )
    # where features were found in the cache, the wall time is not the whole job's
    mlflow.set_tag("feature_cache", result.extracted.cache if result.extracted else "none")
    if result.extracted is not None:
        times["extraction_time_s"] = result.extracted.seconds
        times["saved_time_s"] = result.extracted.saved_s
        mlflow.log_params(
            {
                "used.feature_runtime": result.extracted.runtime,
                "used.feature_arithmetic": result.extracted.arithmetic,
            }
        )
    log_missing_params(
        {"train_images": result.train_images, "validation_images": result.validation_images}
    )
    log_missing_metrics(times)
    recipes = {"requested": asdict(job.requested), "used": asdict(job.used)}
    mlflow.log_dict({"variant": job.variant, **recipes}, RECIPE_ARTIFACT)
    mlflow.log_text(json.dumps(result.history, indent=1), HISTORY_ARTIFACT)
    mlflow.log_figure(draw_curves(result.history), "figures/learning_curves.png")
    _log_manifest(job.manifest)


def log_evaluation(
    evaluation: Evaluation, latency: Latency, manifest: Manifest, model_id: str | None
) -> None:
    """Test scores and latency, linked to the model and the data set, with tables and figures."""
    links = {"model_id": model_id, "dataset": _build_dataset(manifest)}
    log_metrics_once(evaluation.scores, **links)
    log_missing_metrics(asdict(latency), **links)
    tables = {
        "per_class": evaluation.per_class,
        "predictions": evaluation.predictions,
        "mistakes": evaluation.mistakes,
        "reliability": evaluation.reliability,
        "accuracy_by_duplicate": tabulate_by_duplicate(evaluation, manifest),
    }
    for name, table in tables.items():
        log_table_file(table, f"evaluation/{name}.csv")
    drawn = {
        "confusion_matrix": draw_confusion(evaluation),
        "class_recall": draw_class_intervals(evaluation),
        "reliability": draw_reliability(evaluation),
        "mistakes": draw_mistakes(evaluation, manifest.root),
    }
    for name, figure in drawn.items():
        mlflow.log_figure(figure, f"figures/{name}.png")
