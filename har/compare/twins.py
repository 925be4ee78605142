"""Twins: trainings of one recipe on the same images and on different hardware.

When a training ends, it and its twins are linked by tags such as `twin.2xT4`. They are compared
only when someone asks for it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
from mlflow.exceptions import MlflowException

from har.evaluation.metrics import in_points, paired_difference
from har.notebooks import NOTEBOOKS
from har.tracking.query import find_runs, find_training, load_predictions
from har.tracking.records import DIGESTS, Record, find_hits_by_path, read_record
from har.tracking.store import quiet_mlflow, retry_once
from har.tracking.tags import NOTEBOOK, SOURCE_TAG
from har.util.errors import UserError, first_line
from har.util.progress import warn

# Precedes the twin's hardware in a tag's name, or `notebook` for the variant's published run.
TAG = "twin."
NO_TWINS = (
    "no twins: no finished training of the same recipe, data and test split on other hardware"
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A twin as ratios twin / training; None where not known.

    `difference` is the twin's test accuracy minus the training's, with the low and the high end of
    its 95 % interval.
    """

    twin: Record
    time_ratio: float | None
    speed_ratio: float | None
    difference: tuple[float, float, float] | None


def find_twins(record: Record, others: Iterable[Record]) -> list[Record]:
    """Find the newest twin on each other hardware, and the published run of the same variant."""
    found: dict[str, Record] = {}
    for each in sorted(others, key=lambda other: (other.started, other.run_id)):
        if each.published:
            if each.variant == record.variant:
                found[NOTEBOOK] = each
        elif each.digests == record.digests and each.hardware != record.hardware:
            found[each.hardware] = each
    return [found[hardware] for hardware in sorted(found)]


def name_tag(twin: Record) -> str:
    """Name the tag that links to a twin; MLflow allows no `+` there."""
    return TAG + (NOTEBOOK if twin.published else twin.hardware.replace("+", "."))


def compare_twins(
    record: Record,
    twin: Record,
    here: npt.NDArray[np.bool_] | None = None,
    there: npt.NDArray[np.bool_] | None = None,
) -> Comparison:
    """Compare a twin with a training. `here` and `there` say of each test image, in one order,
    whether the training and the twin are right; None where that is not known.
    """
    difference = None
    if here is not None and there is not None and len(here) == len(there):
        difference = paired_difference(here, there)
    # after a cache hit the wall time is not the whole job's
    whole = not (record.cache_hit or twin.cache_hit)
    return Comparison(
        twin=twin,
        time_ratio=_ratio(twin.seconds, record.seconds) if whole else None,
        speed_ratio=_ratio(twin.images_per_second, record.images_per_second),
        difference=difference,
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def format_comparisons(record: Record, comparisons: Sequence[Comparison]) -> str:
    """Format the table that `har twins` prints; its first row is the training itself."""
    rows = [_table_row(record, None), *(_table_row(each.twin, each) for each in comparisons)]
    table = pd.DataFrame(rows).to_string(index=False)
    if comparisons:
        return table
    published = "; `har import-notebooks` records its published run"
    return f"{table}\n{NO_TWINS}{published if record.variant in NOTEBOOKS else ''}"


def _table_row(record: Record, compared: Comparison | None) -> dict[str, str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    hardware = f"{record.hardware}{' (published)' if record.published else ''}"
    difference = compared.difference if compared else None
    return {
        "hardware": f"{hardware}{' (cache hit)' if record.cache_hit else ''}",
        "wall time s": shown(record.seconds, ",.0f"),
        "ratio": shown(compared.time_ratio, ".2f") if compared else "1",
        "images/s": shown(record.images_per_second, ",.0f"),
        "accuracy": shown(record.accuracy, ".1%"),
        "difference, points": in_points(difference) if difference else "-",
        "run id": record.run_id,
    }


def link_twins(run_id: str) -> tuple[Record, list[Record]]:
    """Link a training and its twins by tags, in both directions; return it and its twins.

    Each run is FINISHED before it looks for twins. So of two that end at once, at least one sees
    the other and links both. Links to deleted runs are removed.

    Raises:
        UserError: no such run, or not a finished training; the store cannot be used.
    """
    quiet_mlflow()
    try:
        record, runs = _load_family(run_id)
        family = [read_record(each) for each in runs]
        for run, own in zip(runs, family, strict=True):
            if not own.published:
                _write_tags(run, find_twins(own, family))
    # a run that somebody changed by hand may lack anything
    except (MlflowException, OSError, KeyError, ValueError) as error:
        raise UserError(f"cannot link the twins of run {run_id}: {first_line(error)}") from error
    return record, find_twins(record, family)


def describe_twins(run_id: str) -> str:
    """Link a training's twins and compare them with it, in a table.

    Raises:
        UserError: as `link_twins`.
    """
    record, twins = link_twins(run_id)
    here = _load_hits(record)
    compared = [compare_twins(record, twin, here, _load_hits(twin)) for twin in twins]
    return format_comparisons(record, compared)


def _load_family(run_id: str) -> tuple[Record, list[mlflow.entities.Run]]:
    """Load the training, and all runs that are twins of one another with it, itself included."""
    run = find_training(run_id)
    tags = run.data.tags
    if not all(name in tags for name in DIGESTS):
        raise UserError(f"run {run_id} was published: ask for the twins of a measured run")
    same = " and ".join(f"tags.{name} = '{tags[name]}'" for name in DIGESTS)
    family = find_runs(f"{same} and tags.job = 'train' and attributes.status = 'FINISHED'")
    variants = {each.data.tags["variant"] for each in family}
    published = find_runs(f"tags.{SOURCE_TAG} = '{NOTEBOOK}' and attributes.status = 'FINISHED'")
    family += [each for each in published if each.data.tags["variant"] in variants]
    return read_record(run), family


def _load_hits(record: Record) -> npt.NDArray[np.bool_] | None:
    """Load which test images a run is right on, in the order of their paths."""
    if record.accuracy is None:
        return None
    try:
        return find_hits_by_path(load_predictions(record.run_id)).to_numpy()
    except UserError as error:
        warn(str(error))
        return None


def _write_tags(run: mlflow.entities.Run, twins: Sequence[Record]) -> None:
    client, tags = mlflow.MlflowClient(), run.data.tags
    wanted = {name_tag(twin): twin.run_id for twin in twins}

    def write() -> None:
        for name, value in wanted.items():
            if tags.get(name) != value:
                client.set_tag(run.info.run_id, name, value)

    # two runs that end at once may write the same new tag
    retry_once(write)
    for name in tags:
        if name.startswith(TAG) and name not in wanted:
            client.delete_tag(run.info.run_id, name)
