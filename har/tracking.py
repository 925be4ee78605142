"""What is written into MLflow runs: of data prepared, of a training, of an evaluation."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import mlflow
import mlflow.data.pandas_dataset
from mlflow.entities import Metric
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from har import data_report, figures
from har.devices import Hardware, hardware_tag
from har.duplicates import describe_groups
from har.evaluation import Evaluation, compare_siblings
from har.journal import journal_of
from har.manifest import Manifest, texts_of
from har.packaging import Latency
from har.recipe import VARIANTS, Recipe, describe_changes, items
from har.runtimes import AUTO
from har.splits import Split
from har.store import (
    briefly,
    log_dataset,
    log_metrics_once,
    log_missing_metrics,
    log_missing_params,
    log_table_file,
)
from har.training import OnEpoch, Result

RECIPE_ARTIFACT, HISTORY_ARTIFACT = "recipe.json", "history.json"
# Where a training's numbers come from: measured by this project, or published in a notebook.
SOURCE_TAG, MEASURED, NOTEBOOK = "source", "measured", "notebook"
# Of a recipe: what the UI shows and filters by under its plain name.
PLAIN_FIELDS = ("precision", "strategy", "backbone")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training as asked for and as it can run here: what a run is labelled with.

    `typed` names the fields that the user insists on. `runtime` is what was asked for;
    `feature_runtime` computes features, if the recipe wants any.
    """

    variant: str
    requested: Recipe
    used: Recipe
    typed: tuple[str, ...]
    hardware: Hardware
    replicas: int
    recipe_digest: str
    manifest: Manifest
    runtime: str
    feature_runtime: str

    @property
    def serving_runtime(self) -> str:
        """What the logged model computes with."""
        return "tensorflow" if self.runtime == AUTO else self.runtime

    @property
    def hardware_tag(self) -> str:
        """Such as `2xT4`."""
        return hardware_tag(self.hardware, self.replicas)

    @property
    def changed(self) -> str:
        """What really ran beside the variant's own fields, `field=value, ...`, or `none`."""
        return describe_changes(VARIANTS[self.variant], self.used) or "none"


def log_trial(trial: Trial) -> None:
    """Parameters and the data set, before training starts."""
    log_missing_params(trial_params(trial))
    log_dataset(manifest_dataset(trial.manifest), "training")


def trial_params(trial: Trial) -> dict[str, Any]:
    """Requested (plain and `recipe.*`), used (`used.*`) and found facts."""
    used, hardware = trial.used, trial.hardware
    return {
        "variant": trial.variant,
        **recipe_params(trial.requested),
        **{f"used.{name}": getattr(used, name) for name in (*PLAIN_FIELDS, "batch_size")},
        "runtime": trial.runtime,
        "used.serving_runtime": trial.serving_runtime,
        "gpu_type": hardware.gpu_type,
        "num_gpus": hardware.num_gpus,
        "gpu_names": ", ".join(hardware.gpu_names) or "none",
        "num_replicas": trial.replicas,
        "compute_capability": ", ".join(hardware.compute_capabilities) or "none",
        "nvidia_driver": hardware.driver,
        "cpu": hardware.cpu,
        "cpu_count": hardware.cpu_count,
        "memory_gb": hardware.memory_gb,
        **split_params(trial.manifest),
    }


def recipe_params(recipe: Recipe) -> dict[str, Any]:
    """What was asked for: some under their plain names, the others as `recipe.*`."""
    asked = {each.name: value for each, value in items(recipe)}
    plain = {name: asked.pop(name) for name in PLAIN_FIELDS}
    return {**plain, **{f"recipe.{name}": value for name, value in asked.items()}}


def split_params(manifest: Manifest) -> dict[str, Any]:
    """How the data was split, by the names of the options."""
    return {each.name: manifest.summary[each.name] for each in fields(Split)}


def data_tags(manifest: Manifest) -> dict[str, str]:
    """Which data a run is about; runs compare only under one test digest."""
    return {
        "dataset": manifest.name,
        "dataset_digest": manifest.dataset_digest,
        "test_digest": manifest.test_digest,
    }


def preparation_tags(manifest: Manifest) -> dict[str, str]:
    """Of a run that only prepares data."""
    return {
        MLFLOW_RUN_NAME: f"prepare · {manifest.name}",
        "job": "prepare",
        **data_tags(manifest),
    }


def log_preparation(manifest: Manifest, report: str) -> None:
    """The data set, its split, counts, tables, pictures and the page `report`."""
    # counts are no metrics: those would stand among accuracies in the UI's charts
    log_missing_params({**split_params(manifest), **count_images(manifest)})
    log_dataset(manifest_dataset(manifest), "preparation")
    log_manifest(manifest)
    log_table_file(describe_groups(manifest.table), "duplicates.csv")
    mlflow.log_text(report, data_report.REPORT_FILE)
    mlflow.log_figure(data_report.draw_class_balance(manifest), "figures/class_balance.png")
    mlflow.log_figure(data_report.draw_samples(manifest), "figures/samples.png")


def count_images(manifest: Manifest) -> dict[str, int]:
    """Of images, classes, groups of copies, and of what was left out."""
    facts, counts = manifest.summary, manifest.table["split"].value_counts()
    plain = ("images", "duplicate_groups", "near_duplicate_groups", "conflicting_groups")
    return {
        **{name: facts[name] for name in plain},
        "classes": len(manifest.class_names),
        **{f"{split}_images": int(counts.get(split, 0)) for split in ("train", "test", "unused")},
        **{name: len(facts[name]) for name in ("dropped", "strays", "leaks")},
    }


def log_manifest(manifest: Manifest) -> None:
    """Both files of a prepared folder."""
    for name, text in texts_of(manifest).items():
        mlflow.log_text(text, name)


def comparison_tags(runs: int) -> dict[str, str]:
    """Of a run that compares others."""
    return {MLFLOW_RUN_NAME: f"compare · {runs} runs", "job": "compare"}


def ablation_tags(from_variant: str, to_variant: str, manifest: Manifest) -> dict[str, str]:
    """Of a run with trainings under it, one for each recipe between two variants."""
    return {
        MLFLOW_RUN_NAME: f"ablate · {from_variant} to {to_variant}",
        "job": "ablate",
        **data_tags(manifest),
    }


def trial_tags(trial: Trial, parent: str | None = None) -> dict[str, str]:
    """What runs are found and compared by; `parent` is a run's id."""
    return {
        **({MLFLOW_PARENT_RUN_ID: parent} if parent else {}),
        MLFLOW_RUN_NAME: name_run(trial.variant, trial.used, trial.hardware_tag),
        SOURCE_TAG: MEASURED,
        "job": "train",
        "variant": trial.variant,
        "changed": trial.changed,
        "hardware": trial.hardware_tag,
        **data_tags(trial.manifest),
        "recipe_digest": trial.recipe_digest,
    }


def name_run(variant: str, used: Recipe, hardware: str) -> str:
    """Such as `v3 · lite0 · 1xCPU`."""
    backbone = used.backbone.removeprefix("efficientnet").removeprefix("-")
    return f"{variant} · {backbone} · {hardware}"


def evaluation_tags(
    uri: str, trained_by: mlflow.entities.Run | None, manifest: Manifest
) -> dict[str, str]:
    """Of a run that judges a model which was trained elsewhere, by a run known here or not."""
    tags = {"job": "evaluate", "evaluated_model": uri, **data_tags(manifest)}
    if trained_by is None:
        return {MLFLOW_RUN_NAME: f"evaluate · {uri}", **tags}
    inherited = {name: trained_by.data.tags[name] for name in ("variant", "changed")}
    return {
        MLFLOW_RUN_NAME: f"evaluate · {trained_by.info.run_name}",
        "trained_by": trained_by.info.run_id,
        **inherited,
        **tags,
    }


def manifest_dataset(manifest: Manifest) -> mlflow.data.pandas_dataset.PandasDataset:
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
def epochs_of(run_id: str, history: Sequence[dict[str, float]]) -> Iterator[OnEpoch]:
    """Yield what logs an epoch while training runs on, whether or not the store answers.

    Of a run that is gone on with, epochs of `history` that it lacks are logged first, and those
    that it has, and that are trained again, are not.
    """
    with briefly():
        logged = mlflow.MlflowClient().get_metric_history(run_id, "epoch_time_s")
    known = {each.step for each in logged}

    def send(entry: tuple[int, dict[str, float], int]) -> None:
        with briefly():
            log_epoch(run_id, *entry)

    with journal_of(send) as add:

        def log_once(epoch: int, metrics: dict[str, float]) -> None:
            if epoch not in known:
                add((epoch, metrics, int(1000 * time.time())))

        for epoch, metrics in enumerate(history, start=1):
            log_once(epoch, metrics)
        yield log_once


def log_result(trial: Trial, result: Result) -> None:
    """The numbers of a finished training, its recipe, history and curves."""
    times = {"train_time_s": result.train_time_s}
    if result.best_epoch is not None:
        best = result.history[result.best_epoch - 1]
        log_metrics_once(
            {"best_epoch": result.best_epoch, "best_val_accuracy": best["val_accuracy"]}
        )
    # a warm run's times are not quoted beside others
    mlflow.set_tag("features", result.extracted.state if result.extracted else "none")
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
    recipes = {"requested": asdict(trial.requested), "used": asdict(trial.used)}
    mlflow.log_dict({"variant": trial.variant, **recipes}, RECIPE_ARTIFACT)
    mlflow.log_text(json.dumps(result.history, indent=1), HISTORY_ARTIFACT)
    mlflow.log_figure(figures.draw_curves(result.history), "figures/learning_curves.png")
    log_manifest(trial.manifest)


def log_evaluation(
    evaluation: Evaluation, latency: Latency, manifest: Manifest, model_id: str | None
) -> None:
    """Test scores and latency, linked to the model and the data set, with tables and figures."""
    links = {"model_id": model_id, "dataset": manifest_dataset(manifest)}
    log_metrics_once(asdict(evaluation.scores), **links)
    log_missing_metrics(asdict(latency), **links)
    tables = {
        "per_class": evaluation.per_class,
        "predictions": evaluation.predictions,
        "mistakes": evaluation.mistakes,
        "reliability": evaluation.reliability,
        "siblings": compare_siblings(evaluation, manifest),
    }
    for name, table in tables.items():
        log_table_file(table, f"evaluation/{name}.csv")
    drawn = {
        "confusion_matrix": figures.draw_confusion(evaluation),
        "class_recall": figures.draw_class_intervals(evaluation),
        "reliability": figures.draw_reliability(evaluation),
        "mistakes": figures.draw_mistakes(evaluation, manifest.root),
    }
    for name, figure in drawn.items():
        mlflow.log_figure(figure, f"figures/{name}.png")
