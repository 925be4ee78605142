"""A record is a training read back from the store: a measured one, or a published notebook."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_args

import mlflow
import pandas as pd

from har.data.manifest import MAX_SUMMARY_BYTES, SUMMARY_FILE, Manifest, read_manifest
from har.data.splits import BEFORE_OPTIONS, DrawnBy, Duplicates, LabelSpelling, Split
from har.evaluation.metrics import TEST_METRICS
from har.recipe import VARIANTS
from har.tracking.artifacts import UNREADABLE, read_artifact, read_json_artifact
from har.tracking.query import load_predictions, read_table_artifact
from har.tracking.tags import HISTORY_ARTIFACT, NOTEBOOK, RECIPE_ARTIFACT, SOURCE_TAG, read_tags
from har.util.errors import UserError, first_line
from har.util.files import expand_home
from har.util.json_text import check_number, is_plain
from har.util.progress import progress, warn

# All of these are equal in twins: the recipe's digest says nothing of the hardware.
DIGESTS = ("recipe_digest", "dataset_digest", "test_digest")
# MLflow's own limits are 500 characters for a name and 8,000 for a tag, but a store may hold more.
MAX_TEXT = 1_000
# No second, byte, image or epoch of a training is counted as more than this.
MAX_NUMBER, MAX_EPOCHS = 1e12, 100_000
SPLIT_VALUES = {
    "duplicates": get_args(Duplicates),
    "label_spelling": get_args(LabelSpelling),
    "drawn_by": get_args(DrawnBy),
}
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A training as the store has it; None where a value is not known.

    `started` is in milliseconds since the epoch. `digests` are those of DIGESTS, "" where unknown.
    `seconds` is the wall time; after a `cache_hit` the whole job would have taken `saved_s` more.
    `test_metrics` holds the TEST_METRICS that the run has; accuracies are shares of 1. `runtime` is
    the value of --runtime. The hardware may be `pretended`. Only promotion fills `model_uri`.

    `load_details` fills the rest: `recipe`, every field as used; `history`, the metrics of each
    epoch; `predictions`, path, label and predicted of each test image.
    """

    run_id: str
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
    split: Split | None
    runtime: str | None
    feature_runtime: str | None
    seconds: float | None
    saved_s: float
    images_per_second: float | None
    memory_mb: float | None
    test_metrics: dict[str, float]
    val_accuracy: float | None
    train_accuracy: float | None
    train_images: int | None
    pretended: bool = False
    model_uri: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    predictions: pd.DataFrame | None = None

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the test split."""
        return self.test_metrics.get("accuracy")

    @property
    def test_digest(self) -> str:
        """The digest of the test images: trainings are ranked only within one."""
        return self.digests[DIGESTS.index("test_digest")]

    @property
    def epoch_images(self) -> int:
        """The images trained on in one epoch, in whole batches; 0 where not known."""
        batch_size = self.recipe.get("batch_size", 1)
        return (self.train_images or 0) // batch_size * batch_size


def read_record(run: mlflow.entities.Run) -> Record:
    """Read the tags, parameters and metrics of a training's run; numbers that cannot be are left
    out.

    Raises:
        KeyError: a tag is missing.
        ValueError: a parameter is none of ours.
    """
    tags = {name: value[:MAX_TEXT] for name, value in read_tags(run).items()}
    params = run.data.params
    metrics = {name: value for name, value in run.data.metrics.items() if _is_possible(name, value)}
    feature_cache = tags.get("feature_cache", "none")
    return Record(
        run_id=run.info.run_id,
        name=str(run.info.run_name)[:MAX_TEXT],
        variant=tags["variant"],
        differs_from_variant=tags["differs_from_variant"],
        hardware=tags["hardware"],
        published=tags.get(SOURCE_TAG) == NOTEBOOK,
        pretended="hardware_pretended" in tags,
        cache_hit=feature_cache == "hit",
        started=run.info.start_time or 0,
        digests=tuple(tags.get(name, "") for name in DIGESTS),
        **{
            name: params.get(f"used.{name}", params.get(name, ""))
            for name in ("precision", "strategy", "backbone")
        },
        dataset=tags.get("dataset"),
        split=read_split(run) if "split_seed" in params else None,
        runtime=params.get("runtime"),
        feature_runtime=params.get("used.feature_runtime"),
        train_images=int(params["train_images"]) if "train_images" in params else None,
        seconds=metrics.get("wall_time_s"),
        saved_s=metrics.get("saved_time_s", 0.0),
        # with features, an epoch's images go through the head alone
        images_per_second=metrics.get("images_per_second") if feature_cache == "none" else None,
        memory_mb=metrics.get("peak_memory_mb"),
        val_accuracy=metrics.get("best_val_accuracy", metrics.get("val_accuracy")),
        train_accuracy=metrics.get("train_accuracy"),
        test_metrics={name: metrics[name] for name in TEST_METRICS if name in metrics},
    )


def _is_possible(name: str, value: float) -> bool:
    share = name.removeprefix("best_val_").startswith(("accuracy", "top_", "macro_f1"))
    return 0 <= value <= (1 if share else MAX_NUMBER)


def read_split(run: mlflow.entities.Run) -> Split:
    """Read how a training run held its test images out."""
    params = {**BEFORE_OPTIONS, **run.data.params}
    # parameters are text
    kinds = {name: type(value) for name, value in vars(Split()).items()}
    try:
        values = {name: kind(params[name]) for name, kind in kinds.items() if name in params}
        split = Split(**values)
        check_number(split.test_fraction, "test_fraction", 0, 1)
        for name, allowed in SPLIT_VALUES.items():
            if (value := getattr(split, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}, none of {', '.join(allowed)}")
        return replace(split, test_file=expand_home(split.test_file))
    except ValueError as error:
        raise UserError(
            f"run {run.info.run_id} has no readable options of its split: {first_line(error)}"
        ) from error


def load_details(record: Record) -> Record:
    """Load a record's recipe, history and predictions; warn about what cannot be read."""
    if record.published:
        return replace(record, recipe=asdict(VARIANTS[record.variant]))
    return replace(
        record,
        recipe=_load_or_warn(lambda: _load_recipe(record.run_id), {}),
        history=_load_or_warn(lambda: _load_history(record.run_id), []),
        predictions=_load_or_warn(lambda: load_predictions(record.run_id), None)
        if record.accuracy is not None
        else None,
    )


def _load_recipe(run_id: str) -> dict[str, Any]:
    recipe: dict[str, Any] = read_json_artifact(run_id, RECIPE_ARTIFACT)["used"]
    if not isinstance(recipe, dict) or not all(map(is_plain, recipe.values())):
        raise ValueError(f"{RECIPE_ARTIFACT} of run {run_id} is no recipe")
    if isinstance(weights := recipe.get("weights"), str):
        recipe["weights"] = expand_home(weights)
    check_number(recipe.get("batch_size", 1), f"batch_size of run {run_id}", 1, MAX_NUMBER)
    return recipe


def _load_history(run_id: str) -> list[dict[str, float]]:
    history: list[dict[str, float]] = read_json_artifact(run_id, HISTORY_ARTIFACT)
    if not isinstance(history, list) or len(history) > MAX_EPOCHS:
        raise ValueError(f"{HISTORY_ARTIFACT} of run {run_id} is no list of epochs")
    for epoch in history:
        for name, value in epoch.items():
            # a loss may be NaN or infinite
            if not name.endswith("loss"):
                most = 1 if "accuracy" in name else MAX_NUMBER
                check_number(value, f"{HISTORY_ARTIFACT} of run {run_id}: {name}", 0, most)
    if len({frozenset(epoch) for epoch in history}) > 1:
        raise ValueError(f"{HISTORY_ARTIFACT} of run {run_id}: its epochs differ in their names")
    return history


def _load_or_warn(load: Callable[[], Found], otherwise: Found) -> Found:
    try:
        return load()
    except UNREADABLE as error:
        warn(f"left out: {first_line(error)}")
        return otherwise


def load_records(runs: Iterable[mlflow.entities.Run]) -> list[Record]:
    """Load the records of runs, in their order, with details; warn about what cannot be read."""
    runs, found = list(runs), []
    with progress("reading runs", len(runs)) as advance:
        for run in runs:
            try:
                found.append(load_details(read_record(run)))
            except KeyError as error:
                warn(f"left out: run {run.info.run_id} has no {first_line(error)}")
            except (ValueError, TypeError) as error:
                warn(f"left out: run {run.info.run_id}: {first_line(error)}")
            advance(1)
    return found


def load_recorded_training(run_id: str) -> Record:
    """Load the record of a training that is to be repeated, with its recipe."""
    try:
        record = read_record(mlflow.get_run(run_id))
        recipe = _load_recipe(run_id)
    except UNREADABLE as error:
        raise UserError(f"run {run_id} cannot be repeated: {first_line(error)}") from error
    return replace(record, recipe=recipe)


def load_recorded_manifest(run_id: str, image_root: Path | None) -> Manifest:
    """Load the very images and splits of a training, from the table that its run holds.

    `image_root` is the images' new folder, if they were moved. A UserError says which image is gone
    or has changed.
    """
    with TemporaryDirectory() as scratch:
        try:
            name, table = read_table_artifact(run_id)
            (Path(scratch) / name).write_bytes(table)
            summary = read_artifact(run_id, SUMMARY_FILE, MAX_SUMMARY_BYTES)
            (Path(scratch) / SUMMARY_FILE).write_bytes(summary)
        except UNREADABLE as error:
            raise UserError(
                f"run {run_id} does not say which images it was trained on"
                f" ({first_line(error)}): give them as --data DIR"
            ) from error
        return read_manifest(Path(scratch), image_root)


def check_same_data(record: Record, manifest: Manifest) -> None:
    """Raise a UserError that says what differs, unless `manifest` is the record's data."""
    for name, before in zip(DIGESTS, record.digests, strict=True):
        now = getattr(manifest, name, before)
        if now != before:
            raise UserError(
                f"these are not the images of run {record.run_id}: its {name} is {before}, this"
                f" data's is {now}; give the same folder as --data"
            )


def find_hits_by_path(predictions: pd.DataFrame) -> "pd.Series[bool]":
    """Return whether each test image was classified correctly, by path and sorted by it."""
    table = predictions.set_index("path").sort_index()
    return table["predicted"] == table["label"]
