"""One recipe on several kinds of hardware: times, accuracies, and what a ratio of times is made of.

Measured runs of one recipe, data set and split are a family. Published runs are of other images and
another network; they are families of their own, by variant.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from har.compare.costs import Cost, measure_cost, split_difference
from har.tracking.records import Record

# For each family a row for each hardware, the slowest first.
COLUMNS = (
    "hardware", "source", "runs", "wall_time_s", "images_per_second", "epoch_time_s", "accuracy",
    "accuracy_low", "accuracy_high", "times_as_fast", "of_time_an_image", "of_number_of_images",
    "of_before_and_after_fit",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """The runs of one recipe; `table` has the columns COLUMNS. Times of runs that found features in
    the cache are left out. The last three columns are the seconds by which each cause makes the
    time differ from the first row's.
    """

    name: str
    published: bool
    table: pd.DataFrame


def find_families(records: Sequence[Record]) -> list[Family]:
    """Group runs by recipe, those with the most kinds of hardware first; in each, the newest run on
    each hardware is shown.
    """
    found: dict[tuple[object, ...], list[Record]] = {}
    for each in sorted(records, key=lambda one: (one.started, one.run_id), reverse=True):
        key = ("published",) if each.published else each.digests
        found.setdefault(key, []).append(each)
    families = [_build_family(each) for each in found.values()]
    return sorted(families, key=lambda each: (each.published, -len(each.table)))


def _build_family(records: Sequence[Record]) -> Family:
    first = records[0]
    if first.published:
        name = "The notebooks, as published: other images, another network"
        newest = {f"{each.variant} {each.hardware}": each for each in reversed(records)}
    else:
        differs = first.differs_from_variant
        name = first.variant + ("" if differs == "none" else f" with {differs}")
        newest = {each.hardware: each for each in reversed(records)}
    counts = pd.Series([_name_row(each) for each in records]).value_counts()
    shown = sorted(newest.values(), key=lambda each: -(_whole_seconds(each) or 0))
    rows = [_build_row(each, shown[0]) | {"runs": counts[_name_row(each)]} for each in shown]
    return Family(
        name=name, published=first.published, table=pd.DataFrame(rows, columns=list(COLUMNS))
    )


def _name_row(record: Record) -> str:
    return f"{record.variant} {record.hardware}" if record.published else record.hardware


def _whole_seconds(record: Record) -> float | None:
    return None if record.cache_hit else record.seconds


def _build_row(record: Record, base: Record) -> dict[str, object]:
    seconds, base_s = _whole_seconds(record), _whole_seconds(base)
    epochs = [epoch["epoch_time_s"] for epoch in record.history if "epoch_time_s" in epoch]
    source = "published" if record.published else "pretended" if record.pretended else "measured"
    row: dict[str, object] = {
        "hardware": _name_row(record),
        "source": source,
        "wall_time_s": seconds,
        "images_per_second": record.images_per_second,
        "epoch_time_s": float(np.median(epochs)) if epochs else None,
        **{name: record.test_metrics.get(name) for name in COLUMNS if name.startswith("accuracy")},
        "times_as_fast": base_s / seconds if seconds and base_s else None,
    }
    before, after = _find_cost(base), _find_cost(record)
    if before is not None and after is not None and record is not base:
        causes = split_difference(before, after)
        row |= {f"of_{name.replace(' ', '_')}": value for name, value in causes.items()}
    return row


def _find_cost(record: Record) -> Cost | None:
    timed = record.history and "epoch_time_s" in record.history[0]
    if not timed or not record.epoch_images or not _whole_seconds(record):
        return None
    return measure_cost([record])
