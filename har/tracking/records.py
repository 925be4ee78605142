"""Trainings, read back from the store: measured ones, and the notebooks' published ones."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException

from har.data.manifest import Manifest
from har.data.splits import Split
from har.evaluation.metrics import TEST_METRICS
from har.recipe import VARIANTS, Recipe
from har.tracking.query import load_predictions
from har.tracking.store import quiet_mlflow
from har.tracking.tags import (
    HISTORY_ARTIFACT,
    NOTEBOOK,
    RECIPE_ARTIFACT,
    SOURCE_TAG,
    read_tags,
)
from har.util.errors import UserError, first_line
from har.util.progress import progress, warn

# All of these must be equal in twins; the recipe's holds nothing of the hardware.
DIGESTS = ("recipe_digest", "dataset_digest", "test_digest")
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What a finished training, or a published one, says of itself. None: not known.

    `started` is in milliseconds since the epoch; `digests` are those of DIGESTS, empty for a
    published one; `cache_hit`: features were found in the cache, so `seconds`, the wall time, is
    not the whole job's, which had taken `saved_s` more. `test_metrics` are those of TEST_METRICS
    that the run has; accuracies are shares.
    """

    run_id: str
    experiment_id: str
    name: str
    variant: str
    differs_from_variant: str
    hardware: str
    published: bool
    cache_hit: bool
    started: int
    digests: tuple[str, ...]
    precision: str
    strategy: str
    backbone: str
    dataset: str | None
    seconds: float | None
    saved_s: float
    images_per_second: float | None
    memory_mb: float | None
    test_metrics: dict[str, float]
    val_accuracy: float | None
    train_accuracy: float | None
    train_images: int | None

    @property
    def accuracy(self) -> float | None:
        """Of the test split, if the run has one."""
        return self.test_metrics.get("accuracy")

    @property
    def test_digest(self) -> str:
        """Trainings are ranked only within one; empty for a published one."""
        return self.digests[DIGESTS.index("test_digest")]


def read_training(run: Any) -> TrainingSummary:
    """Of an MLflow run that `har run` or `har import-notebooks` recorded."""
    tags, params, metrics = read_tags(run), run.data.params, run.data.metrics
    feature_cache = tags.get("feature_cache", "none")
    return TrainingSummary(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name,
        variant=tags["variant"],
        differs_from_variant=tags["differs_from_variant"],
        hardware=tags["hardware"],
        published=tags.get(SOURCE_TAG) == NOTEBOOK,
        cache_hit=feature_cache == "hit",
        started=run.info.start_time,
        digests=tuple(tags.get(name, "") for name in DIGESTS),
        **{
            name: params.get(f"used.{name}", params.get(name, ""))
            for name in ("precision", "strategy", "backbone")
        },
        dataset=tags.get("dataset"),
        train_images=int(params["train_images"]) if "train_images" in params else None,
        seconds=metrics.get("wall_time_s"),
        saved_s=metrics.get("saved_time_s", 0.0),
        # with features an epoch's images are those that the head alone saw
        images_per_second=metrics.get("images_per_second") if feature_cache == "none" else None,
        memory_mb=metrics.get("peak_memory_mb"),
        val_accuracy=metrics.get("best_val_accuracy", metrics.get("val_accuracy")),
        train_accuracy=metrics.get("train_accuracy"),
        test_metrics={name: metrics[name] for name in TEST_METRICS if name in metrics},
    )


@dataclass(frozen=True, kw_only=True)
class Record:
    """A training with what lies beside it in the store; empty or None where there is nothing.

    `recipe`: every field as used; `history`: the metrics of each epoch; `predictions`: path, label
    and predicted of each test image; `root`: the folder that `path` started from.
    """

    training: TrainingSummary
    recipe: dict[str, Any]
    history: list[dict[str, float]]
    predictions: pd.DataFrame | None
    root: str | None

    @property
    def epoch_images(self) -> int:
        """How many were trained on in one epoch, in whole batches; 0: not known."""
        batch_size = self.recipe.get("batch_size", 1)
        return (self.training.train_images or 0) // batch_size * batch_size


def find_hits_by_path(predictions: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each test image was told right, by path and in the order of the paths."""
    table = predictions.set_index("path").sort_index()
    return table["predicted"] == table["label"]


def load_records(runs: Iterable[Any]) -> list[Record]:
    """Of MLflow runs, in their order; what cannot be read is warned of."""
    runs, found = list(runs), []
    with progress("reading runs", len(runs)) as advance:
        for run in runs:
            try:
                found.append(load_record(read_training(run)))
            except KeyError as error:
                warn(f"left out: run {run.info.run_id} has no {first_line(error)}")
            advance(1)
    return found


def load_record(training: TrainingSummary) -> Record:
    """Everything of one training."""
    if training.published:
        recipe = asdict(VARIANTS[training.variant])
        return Record(training=training, recipe=recipe, history=[], predictions=None, root=None)
    uri, load = f"runs:/{training.run_id}", mlflow.artifacts.load_dict
    described: dict[str, Any] = _load_or_warn(lambda: load(f"{uri}/dataset.json"), {})
    return Record(
        training=training,
        recipe=_load_or_warn(lambda: load(f"{uri}/{RECIPE_ARTIFACT}")["used"], {}),
        history=_load_or_warn(lambda: load(f"{uri}/{HISTORY_ARTIFACT}"), []),
        predictions=_load_or_warn(lambda: load_predictions(training.run_id), None)
        if training.accuracy is not None
        else None,
        root=described.get("root"),
    )


def _load_or_warn(load: Callable[[], Found], otherwise: Found) -> Found:
    """What is loaded, or `otherwise` and a warning."""
    try:
        return load()
    except (MlflowException, OSError, ValueError, KeyError, UserError) as error:
        warn(f"left out: {first_line(error)}")
        return otherwise


def read_split(run: mlflow.entities.Run) -> Split:
    """How a training run held its test images out."""
    params = run.data.params
    # parameters are text
    kinds = {name: type(value) for name, value in vars(Split()).items()}
    return Split(**{name: kind(params[name]) for name, kind in kinds.items()})


@dataclass(frozen=True, kw_only=True)
class RecordedJob:
    """What is needed to repeat a recorded training."""

    run_id: str
    variant: str
    recipe: Recipe
    split: Split
    digests: dict[str, str]
    runtime: str
    feature_runtime: str | None


def load_recorded_job(run_id: str) -> RecordedJob:
    """Read a training run's recipe as used, its split, and the digests of its data.

    Raises:
        UserError: no such run, or not a training run of this project.
    """
    quiet_mlflow()
    try:
        run = mlflow.get_run(run_id)
        recipe = mlflow.artifacts.load_dict(f"runs:/{run_id}/{RECIPE_ARTIFACT}")
        return RecordedJob(
            run_id=run_id,
            variant=recipe["variant"],
            recipe=Recipe(**recipe["used"]),
            split=read_split(run),
            runtime=run.data.params["runtime"],
            feature_runtime=run.data.params.get("used.feature_runtime"),
            digests={name: run.data.tags[name] for name in ("dataset_digest", "test_digest")},
        )
    except (MlflowException, OSError, KeyError, TypeError) as error:
        raise UserError(f"run {run_id} cannot be repeated: {first_line(error)}") from error


def check_same_data(past: RecordedJob, manifest: Manifest) -> None:
    """Raise a UserError that says what differs unless the data are those of the past run."""
    for name, before in past.digests.items():
        if (now := getattr(manifest, name)) != before:
            raise UserError(
                f"these are not the images of run {past.run_id}: its {name} is {before}, this"
                f" data's is {now}"
            )
