"""Recipe, result and evaluation into an MLflow run.

Works inside `mlflow run`, which opens the run and logs the typed parameters before our code
starts, and without it; on the default sqlite store and on an http server.
"""

import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.data.pandas_dataset
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

from har import evaluation as evaluations
from har.classifier import CLASSIFIER_FOLDER, Classifier
from har.devices import Hardware, hardware_tag
from har.errors import UserError
from har.evaluation import Evaluation
from har.interrupts import interrupts_at_checkpoints
from har.manifest import Manifest
from har.recipe import VARIANTS, Recipe, describe_changes, items
from har.training import Result

MODEL_NAME = "model"
MANIFEST_ARTIFACT = "manifest.csv"
RECIPE_ARTIFACT = "recipe.json"
PACKAGE = Path(__file__).parent
# What har.serving imports, and no more.
SERVING_PACKAGES = ("mlflow", "tensorflow", "keras", "numpy", "pandas", "pillow")

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "label", required=False),
            ColSpec(DataType.double, "probability", required=False),
            ColSpec(
                Array(
                    Object(
                        [
                            Property("label", DataType.string),
                            Property("probability", DataType.double),
                        ]
                    )
                ),
                "top_3",
            ),
            ColSpec(DataType.string, "error", required=False),
        ]
    ),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training as asked for and as it can run here: what a run is labelled with."""

    variant: str
    requested: Recipe
    used: Recipe
    hardware: Hardware
    replicas: int
    recipe_digest: str
    manifest: Manifest

    @property
    def hardware_tag(self) -> str:
        """Such as `2xT4`."""
        return hardware_tag(self.hardware, self.replicas)

    @property
    def changed(self) -> str:
        """What really ran beside the variant's own fields, `field=value, ...`, or `none`."""
        return describe_changes(VARIANTS[self.variant], self.used) or "none"


@contextmanager
def open_run(experiment: str, tags: Mapping[str, str]) -> Iterator[str]:
    """Yield the id of a run that ends FINISHED, FAILED on an error, KILLED on Ctrl-C.

    Joins the run that `mlflow run` opened; else opens one in `experiment`.

    Raises:
        UserError: the tracking store cannot be used.
    """
    quiet_mlflow()
    try:
        # under `mlflow run` the experiment is chosen already, and choosing again is an error
        if "MLFLOW_RUN_ID" not in os.environ:
            mlflow.set_experiment(experiment)
        run = mlflow.start_run(log_system_metrics=True)
    except (MlflowException, OSError) as error:
        uri = without_password(mlflow.get_tracking_uri())
        raise UserError(f"the tracking store {uri} cannot be used: {error}") from error
    try:
        mlflow.set_tags(dict(tags))
        # else the UI takes the experiment for one of language models, and shows traces and judges
        mlflow.MlflowClient().set_experiment_tag(
            run.info.experiment_id, "mlflow.experimentKind", "custom_model_development"
        )
        yield run.info.run_id
    except KeyboardInterrupt:
        end_run("KILLED")
        raise
    except BaseException:
        end_run("FAILED")
        raise
    end_run("FINISHED")


def end_run(status: str) -> None:
    """End the active run; a Ctrl-C meanwhile cannot leave it RUNNING for ever."""
    with interrupts_at_checkpoints():
        mlflow.end_run(status)


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


def quiet_mlflow() -> None:
    """MLflow's news off; its warnings stay, but for those about what is meant as it is."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for message in (
        "The specified dataset source can be interpreted in multiple ways",  # all the same
        "Hint: Inferred schema contains integer column",  # a manifest's ids are never missing
        "An input example was not provided",  # the signature says it, and pictures are large
        "Add type hints to the `predict` method",  # likewise
    ):
        warnings.filterwarnings("ignore", rf"(?s).*{re.escape(message)}")


def log_trial(trial: Trial) -> None:
    """Parameters and the data set, before training starts."""
    log_missing_params(trial_params(trial))
    mlflow.log_input(manifest_dataset(trial.manifest), context="training")


def trial_params(trial: Trial) -> dict[str, Any]:
    """Requested (plain and `recipe.*`), used (`used.*`) and found facts."""
    used, hardware = trial.used, trial.hardware
    plain = ("precision", "strategy", "backbone")
    return {
        "variant": trial.variant,
        **{name: getattr(trial.requested, name) for name in plain},
        **{f"recipe.{each.name}": value for each, value in items(trial.requested)},
        **{f"used.{name}": getattr(used, name) for name in (*plain, "batch_size")},
        "gpu_type": hardware.gpu_type,
        "num_gpus": hardware.num_gpus,
        "gpu_names": ", ".join(hardware.gpu_names) or "none",
        "num_replicas": trial.replicas,
        "compute_capability": ", ".join(hardware.compute_capabilities) or "none",
        "nvidia_driver": hardware.driver,
        "cpu": hardware.cpu,
        "cpu_count": hardware.cpu_count,
        "memory_gb": hardware.memory_gb,
        "test_fraction": trial.manifest.summary["test_fraction"],
        "split_seed": trial.manifest.summary["split_seed"],
    }


def trial_tags(trial: Trial) -> dict[str, str]:
    """What runs are found and compared by."""
    backbone = trial.used.backbone.removeprefix("efficientnet").removeprefix("-")
    return {
        MLFLOW_RUN_NAME: f"{trial.variant} · {backbone} · {trial.hardware_tag}",
        "variant": trial.variant,
        "changed": trial.changed,
        "hardware": trial.hardware_tag,
        "dataset": trial.manifest.name,
        "dataset_digest": trial.manifest.dataset_digest,
        "test_digest": trial.manifest.test_digest,
        "recipe_digest": trial.recipe_digest,
    }


def evaluation_tags(uri: str, manifest: Manifest) -> dict[str, str]:
    """Of a run that judges a model which was trained elsewhere."""
    return {
        MLFLOW_RUN_NAME: f"evaluation · {uri}",
        "evaluated_model": uri,
        "dataset": manifest.name,
        "dataset_digest": manifest.dataset_digest,
        "test_digest": manifest.test_digest,
    }


def log_missing_params(params: Mapping[str, Any]) -> None:
    """Log what is not there yet: `mlflow run` logged what was typed, as it was typed, and a
    parameter cannot be logged again with another text.
    """
    run = mlflow.active_run()
    assert run is not None
    there = mlflow.get_run(run.info.run_id).data.params
    mlflow.log_params({name: value for name, value in params.items() if name not in there})


def manifest_dataset(manifest: Manifest) -> mlflow.data.pandas_dataset.PandasDataset:
    """The manifest as an MLflow data set under our own digest."""
    return mlflow.data.pandas_dataset.from_pandas(
        manifest.table,
        source=str(manifest.root),
        targets="label",
        name=manifest.name,
        digest=manifest.dataset_digest,
    )


def log_epoch(epoch: int, metrics: dict[str, float]) -> None:
    """One epoch's metrics, while training runs; `epoch` counts from 1 and is the step."""
    mlflow.log_metrics(metrics, step=epoch)


def log_result(trial: Trial, result: Result) -> None:
    """The numbers of a finished training, its recipe, history and curves."""
    numbers = {"train_time_s": result.train_time_s}
    if result.best_epoch is not None:
        best = result.history[result.best_epoch - 1]
        numbers |= {"best_epoch": result.best_epoch, "best_val_accuracy": best["val_accuracy"]}
    mlflow.log_metrics(numbers)
    recipes = {"requested": asdict(trial.requested), "used": asdict(trial.used)}
    mlflow.log_dict({"variant": trial.variant, **recipes}, RECIPE_ARTIFACT)
    mlflow.log_text(json.dumps(result.history, indent=1), "history.json")
    mlflow.log_figure(evaluations.draw_curves(result.history), "figures/learning_curves.png")
    log_table_file(trial.manifest.table, MANIFEST_ARTIFACT)


def log_evaluation(evaluation: Evaluation, manifest: Manifest, model_id: str | None) -> None:
    """Test scores, linked to the model and the data set, with tables and figures."""
    mlflow.log_metrics(
        asdict(evaluation.scores), model_id=model_id, dataset=manifest_dataset(manifest)
    )
    log_table_file(evaluation.per_class, "evaluation/per_class.csv")
    log_table_file(evaluation.predictions, "evaluation/predictions.csv")
    mlflow.log_figure(evaluations.draw_confusion(evaluation), "figures/confusion_matrix.png")


def log_table_file(table: Any, artifact: str) -> None:
    """A table as a CSV artifact."""
    mlflow.log_text(table.to_csv(index=False), artifact)


def log_classifier(folder: Path, classifier: Classifier) -> str:
    """The classifier in `folder` as a model for `mlflow models serve`; returns its model id.

    MLflow keeps the folder under its own name: it must be called CLASSIFIER_FOLDER.
    """
    assert folder.name == CLASSIFIER_FOLDER
    model = mlflow.pyfunc.log_model(
        name=MODEL_NAME,
        python_model=str(PACKAGE / "serving.py"),
        artifacts={CLASSIFIER_FOLDER: str(folder)},
        code_paths=[str(PACKAGE)],
        signature=SIGNATURE,
        # the very versions that judged it; the CPU build, which also serves
        pip_requirements=[f"{name}=={version(name)}" for name in SERVING_PACKAGES],
        metadata={"class_names": list(classifier.class_names)},
    )
    return str(model.model_id)


def describe_run(trial: Trial, result: Result, evaluation: Evaluation | None) -> str:
    """The run's description in Markdown: what ran, how it came out, how to use it."""
    lines = [
        f"**{trial.variant}** on {trial.hardware_tag}, data `{trial.manifest.name}`",
        f"changed from the variant: {trial.changed}",
        f"{len(result.history)} epochs of {result.train_images:,} images,"
        f" {result.history[-1]['images_per_second']:.0f} images/s",
    ]
    if evaluation:
        scores = evaluation.scores
        lines.append(
            f"test accuracy {scores.accuracy:.1%} ({scores.accuracy_low:.1%} to"
            f" {scores.accuracy_high:.1%}, 95 %), top-3 {scores.top_3_accuracy:.1%},"
            f" {len(evaluation.label_ids):,} images"
        )
    else:
        lines.append("no test split: no accuracy")
    return "  \n".join(lines)


def set_description(text: str) -> None:
    """Shown above the run in the MLflow UI, as Markdown."""
    mlflow.set_tag(MLFLOW_RUN_NOTE, text)
