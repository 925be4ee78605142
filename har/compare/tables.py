"""Trainings compared: pure functions from records to tables.

Accuracies are compared only where the test images are the same, that is within one test digest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from har.evaluation.metrics import (
    TEST_METRICS,
    correct_for_many,
    paired_difference,
    paired_test,
    wilson_intervals,
)
from har.notebooks import NOTEBOOKS
from har.recipe import Recipe
from har.tracking.records import Record, find_hits_by_path

# Shown instead of what is not known.
MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Records evaluated on the same test images; `ranked` by test accuracy, best first."""

    test_digest: str
    ranked: tuple[Record, ...]


def group_by_test(records: Sequence[Record]) -> tuple[list[Group], list[Record]]:
    """Groups, that of the newest run first; and the records without a test accuracy."""
    evaluated = [each for each in records if each.accuracy is not None]
    evaluated.sort(key=lambda each: (each.started, each.run_id), reverse=True)
    digests = dict.fromkeys(each.test_digest for each in evaluated)
    groups = []
    for digest in digests:
        within = [each for each in evaluated if each.test_digest == digest]
        within.sort(key=lambda each: -(each.accuracy or 0.0))
        groups.append(Group(test_digest=digest, ranked=tuple(within)))
    return groups, [each for each in records if each.accuracy is None]


def tabulate_runs(records: Sequence[Record]) -> pd.DataFrame:
    """One row a run: what it was, how good, how long; NaN or None where not known."""
    return pd.DataFrame([run_row(each) for each in records], columns=_run_columns())


def _run_columns() -> list[str]:
    """Of the table of runs, every metric of the test split among them."""
    return [
        "run_id", "name", "source", "variant", "differs_from_variant", "hardware", "precision",
        "strategy", "backbone", "dataset", "test_digest", *TEST_METRICS,
        "val_accuracy", "train_accuracy", "wall_time_s", "feature_cache",
        "epoch_time_s", "images_per_second", "epochs", "peak_memory_mb", "notebook_minutes",
    ]  # fmt: skip


def run_row(record: Record) -> dict[str, Any]:
    """By `_run_columns`. The time of an epoch is the median one's."""
    history = record.history
    epoch_times = [epoch["epoch_time_s"] for epoch in history if "epoch_time_s" in epoch]
    notebook = NOTEBOOKS.get(record.variant)
    found = {name: getattr(record, name) for name in _run_columns() if hasattr(record, name)}
    return (
        found
        | record.test_metrics
        | {
            "source": "published" if record.published else "measured",
            "wall_time_s": record.seconds,
            "feature_cache": "hit" if record.cache_hit else "",
            "epoch_time_s": float(np.median(epoch_times)) if epoch_times else None,
            "epochs": len(history) or None,
            "peak_memory_mb": record.memory_mb,
            "notebook_minutes": notebook.minutes if notebook else None,
        }
    )


def tabulate_differences(records: Sequence[Record]) -> pd.DataFrame:
    """One row a recipe field that is not the same in all, one column a run id."""
    rows = {
        each.name: [record.recipe.get(each.name, MISSING) for record in records]
        for each in fields(Recipe)
    }
    ids = [record.run_id for record in records]
    differing = {name: values for name, values in rows.items() if len(set(map(str, values))) > 1}
    return pd.DataFrame.from_dict(differing, orient="index", columns=ids, dtype=object)


def tabulate_pairs(group: Group) -> pd.DataFrame:
    """Every pair on the images that both were evaluated on, the better one first.

    difference, low, high: accuracy of `first` minus that of `second`, and its 95 % interval;
    only_first, only_second: images that only one has right; p_value: McNemar's exact test;
    p_corrected: for the number of pairs (Holm).
    """
    evaluated = [each for each in group.ranked if each.predictions is not None]
    if len(evaluated) < 2:
        return pd.DataFrame()
    hits, rows = _find_hits(evaluated), []
    for i, j in combinations(range(len(evaluated)), 2):
        first, second = evaluated[i], evaluated[j]
        both = ~np.isnan(hits[i]) & ~np.isnan(hits[j])
        if not both.any():
            continue
        before, after = hits[j, both] == 1, hits[i, both] == 1
        difference, low, high = paired_difference(before, after)
        only_first, only_second, p_value = paired_test(before, after)
        rows.append(
            {
                "test_digest": group.test_digest,
                "first_name": first.name,
                "first": first.run_id,
                "second_name": second.name,
                "second": second.run_id,
                "images": int(both.sum()),
                "difference": difference,
                "low": low,
                "high": high,
                "only_first": only_first,
                "only_second": only_second,
                "p_value": p_value,
            }
        )
    table = pd.DataFrame(rows)
    if rows:
        table["p_corrected"] = correct_for_many(table["p_value"].to_numpy())
    return table


def _find_hits(evaluated: Sequence[Record]) -> npt.NDArray[np.float64]:
    """(runs, images): 1 where a run is right, 0 where it is not, NaN where it was not evaluated."""
    series = [
        find_hits_by_path(each.predictions).astype(float)
        for each in evaluated
        if each.predictions is not None
    ]
    return pd.concat(series, axis=1).to_numpy().T


def find_pareto_front(group: Group) -> list[Record]:
    """Runs that none beats in both accuracy and wall time, the quickest first. Runs that found
    features in the cache, whose time is not the whole job's, stay out.
    """
    timed = [each for each in group.ranked if each.seconds and not each.cache_hit]
    front: list[Record] = []
    for each in sorted(timed, key=lambda r: (r.seconds, -(r.accuracy or 0.0))):
        if not front or (each.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(each)
    return front


def tabulate_recalls(group: Group) -> pd.DataFrame:
    """One row a run and class: recall with its 95 % interval, and the class's test images."""
    parts = []
    for record in group.ranked:
        if record.predictions is None:
            continue
        right = record.predictions.assign(
            right=record.predictions["predicted"] == record.predictions["label"]
        )
        counts = right.groupby("label")["right"].agg(["sum", "size"])
        low, high = wilson_intervals(counts["sum"].to_numpy(), counts["size"].to_numpy())
        parts.append(
            pd.DataFrame(
                {
                    "name": record.name,
                    "run_id": record.run_id,
                    "label": counts.index,
                    "recall": (counts["sum"] / counts["size"]).to_numpy(),
                    "low": low,
                    "high": high,
                    "images": counts["size"].to_numpy(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def find_disagreements(first: Record, second: Record, count: int) -> pd.DataFrame:
    """Test images that only one of the two has right, at most `count` of either kind: path, label,
    first, second (what each said).
    """
    assert first.predictions is not None and second.predictions is not None
    both = first.predictions.merge(second.predictions, on=["path", "label"], suffixes=("", "_2"))
    both = both.rename(columns={"predicted": "first", "predicted_2": "second"})
    right = both["first"] == both["label"], both["second"] == both["label"]
    parts = [both[right[0] & ~right[1]].head(count), both[right[1] & ~right[0]].head(count)]
    return pd.concat(parts, ignore_index=True)
