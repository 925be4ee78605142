"""Tables that compare trainings: pure functions from records to pandas tables.

Accuracies are compared only on the same test images, which share one test digest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from har.evaluation import metrics
from har.notebooks import NOTEBOOKS
from har.recipe import Recipe
from har.tracking.records import Record, find_hits_by_path

# Shown in place of an unknown value.
MISSING = "-"


def run_columns() -> list[str]:
    """List the columns of the table of runs, every metric of the test split among them."""
    return [
        "run_id", "name", "source", "variant", "differs_from_variant", "hardware", "precision",
        "strategy", "backbone", "dataset", "test_digest", *metrics.TEST_METRICS,
        "val_accuracy", "train_accuracy", "wall_time_s", "feature_cache",
        "epoch_time_s", "images_per_second", "epochs", "peak_memory_mb", "notebook_minutes",
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Group:
    """Records evaluated on the same test images, `ranked` by test accuracy, best first."""

    test_digest: str
    ranked: tuple[Record, ...]

    @property
    def with_predictions(self) -> list[tuple[Record, pd.DataFrame]]:
        """Ranked records whose predictions are known, with the predictions."""
        return [(each, each.predictions) for each in self.ranked if each.predictions is not None]


def group_by_test(records: Sequence[Record]) -> tuple[list[Group], list[Record]]:
    """Return groups, the one with the newest run first, and records without a test accuracy."""
    evaluated = [each for each in records if each.accuracy is not None]
    evaluated.sort(key=lambda each: (each.started, each.run_id), reverse=True)
    groups = []
    for digest in dict.fromkeys(each.test_digest for each in evaluated):
        within = [each for each in evaluated if each.test_digest == digest]
        within.sort(key=lambda each: -(each.accuracy or 0.0))
        groups.append(Group(test_digest=digest, ranked=tuple(within)))
    return groups, [each for each in records if each.accuracy is None]


def tabulate_runs(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row for each run, with run_columns(); NaN or None if a value is unknown."""
    return pd.DataFrame([run_row(each) for each in records], columns=run_columns())


def run_row(record: Record) -> dict[str, Any]:
    """Return the values of run_columns(); `epoch_time_s` is the median of the epochs."""
    history = record.history
    epoch_times = [epoch["epoch_time_s"] for epoch in history if "epoch_time_s" in epoch]
    notebook = NOTEBOOKS.get(record.variant)
    same_name = {name: getattr(record, name) for name in run_columns() if hasattr(record, name)}
    return {
        **same_name,
        **record.test_metrics,
        "source": "published" if record.published else "measured",
        "wall_time_s": record.seconds,
        "feature_cache": "hit" if record.cache_hit else "",
        "epoch_time_s": float(np.median(epoch_times)) if epoch_times else None,
        "epochs": len(history) or None,
        "peak_memory_mb": record.memory_mb,
        "notebook_minutes": notebook.minutes if notebook else None,
    }


def tabulate_differences(records: Sequence[Record]) -> pd.DataFrame:
    """Return one row for each recipe field whose value varies, and one column for each run id."""
    rows = {
        each.name: [record.recipe.get(each.name, MISSING) for record in records]
        for each in fields(Recipe)
    }
    ids = [record.run_id for record in records]
    differing = {name: values for name, values in rows.items() if len(set(map(str, values))) > 1}
    return pd.DataFrame.from_dict(differing, orient="index", columns=ids, dtype=object)


def tabulate_pairs(group: Group) -> pd.DataFrame:
    """Compare every pair of runs on the images that both were evaluated on, the better run first.

    p_corrected is corrected for the number of pairs.
    """
    evaluated = [each for each, _ in group.with_predictions]
    if len(evaluated) < 2:
        return pd.DataFrame()
    # (runs, images): 1 if right, 0 if wrong, NaN if the run was not evaluated on the image
    by_path = [find_hits_by_path(each).astype(float) for _, each in group.with_predictions]
    hits, rows = pd.concat(by_path, axis=1).to_numpy().T, []
    for i, j in combinations(range(len(evaluated)), 2):
        both = ~np.isnan(hits[i]) & ~np.isnan(hits[j])
        if not both.any():
            continue
        before, after = hits[j, both] == 1, hits[i, both] == 1
        difference, low, high = metrics.paired_difference(before, after)
        only_first, only_second, p_value = metrics.paired_test(before, after)
        rows.append(
            {
                "test_digest": group.test_digest,
                "first_name": evaluated[i].name,
                "first": evaluated[i].run_id,
                "second_name": evaluated[j].name,
                "second": evaluated[j].run_id,
                "images": int(both.sum()),
                "difference": difference,  # accuracy of the first run minus that of the second
                "low": low,
                "high": high,
                "only_first": only_first,  # images that only the first run has right
                "only_second": only_second,
                "p_value": p_value,
            }
        )
    table = pd.DataFrame(rows)
    if rows:
        table["p_corrected"] = metrics.correct_for_many(table["p_value"].to_numpy())
    return table


def find_pareto_front(group: Group) -> list[Record]:
    """Return the runs that no other run beats in both accuracy and wall time, fastest first.

    Runs with a feature cache hit are left out: their time is not the time of the whole job.
    """
    timed = [each for each in group.ranked if each.seconds and not each.cache_hit]
    front: list[Record] = []
    for each in sorted(timed, key=lambda r: (r.seconds, -(r.accuracy or 0.0))):
        if not front or (each.accuracy or 0) > (front[-1].accuracy or 0):
            front.append(each)
    return front


def tabulate_recalls(group: Group) -> pd.DataFrame:
    """Return one row for each run and class: recall with its 95 % interval, and test images."""
    parts = []
    for record, predictions in group.with_predictions:
        hits = predictions["predicted"] == predictions["label"]
        counts = hits.groupby(predictions["label"]).agg(["sum", "size"])
        right, images = counts["sum"].to_numpy(), counts["size"].to_numpy()
        low, high = metrics.wilson_intervals(right, images)
        columns = {"label": counts.index, "recall": right / images, "low": low, "high": high}
        part = pd.DataFrame({"name": record.name, "run_id": record.run_id, **columns})
        parts.append(part.assign(images=images))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def find_disagreements(first: Record, second: Record, count: int) -> pd.DataFrame:
    """Return test images that only one of two runs has right, at most `count` for each run.

    The columns are path, label, first and second (the classes that the two predicted).
    """
    assert first.predictions is not None and second.predictions is not None
    both = first.predictions.merge(second.predictions, on=["path", "label"], suffixes=("", "_2"))
    both = both.rename(columns={"predicted": "first", "predicted_2": "second"})
    right = both["first"] == both["label"], both["second"] == both["label"]
    parts = [both[right[0] & ~right[1]].head(count), both[right[1] & ~right[0]].head(count)]
    return pd.concat(parts, ignore_index=True)
