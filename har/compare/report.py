"""The report of a comparison: one HTML page without external files, its tables and figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd

from har.compare.figures import MOST_DRAWN, draw_confusions, draw_curves, draw_recalls, draw_scatter
from har.compare.tables import (
    MISSING,
    Group,
    find_disagreements,
    find_pareto_front,
    group_by_test,
    tabulate_differences,
    tabulate_pairs,
    tabulate_recalls,
    tabulate_runs,
)
from har.data.pictures import draw_png, png_uri, thumbnail_uri
from har.data.report import REPORT_FILE
from har.evaluation.metrics import TEST_METRICS
from har.tracking.records import Record

TEMPLATE = Path(__file__).with_name("report.html")
GALLERY_IMAGES = 12
# Pairs of runs with a corrected p-value below this count as different.
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The page, and its tables and figures (PNG) by file name."""

    page: str
    tables: dict[str, pd.DataFrame]
    figures: dict[str, bytes]


class Column(NamedTuple):
    """How the page shows a column of a table: as text, or as `factor` times a number in `form`."""

    heading: str
    form: str = ""
    factor: float = 1


RUNS = {
    "name": Column("run"),
    "run_id": Column("run id"),
    **{name: Column(each.heading, each.form) for name, each in TEST_METRICS.items()},
    "val_accuracy": Column("validation", ".1%"),
    "train_accuracy": Column("training", ".1%"),
    "wall_time_s": Column("wall time s", ",.0f"),
    "feature_cache": Column("feature cache"),
    "epoch_time_s": Column("epoch s", ",.1f"),
    "images_per_second": Column("images/s", ",.0f"),
    "epochs": Column("epochs", ".0f"),
    "peak_memory_mb": Column("memory MB", ",.0f"),
    "notebook_minutes": Column("notebook min", ".0f"),
    "differs_from_variant": Column("differs from its variant"),
    "hardware": Column("hardware"),
    "precision": Column("precision"),
    "strategy": Column("strategy"),
    "backbone": Column("backbone"),
    "dataset": Column("dataset"),
    "test_digest": Column("test digest"),
    "source": Column("source"),
}
PAIRS = {
    "first_name": Column("first"),
    "first": Column("its run id"),
    "second_name": Column("second"),
    "second": Column("its run id"),
    "images": Column("images", ",.0f"),
    "difference": Column("difference", "+.1f", 100),
    "low": Column("from", "+.1f", 100),
    "high": Column("to", "+.1f", 100),
    "only_first": Column("only first right", ",.0f"),
    "only_second": Column("only second right", ",.0f"),
    "p_value": Column("p", ".3g"),
    "p_corrected": Column("p corrected", ".3g"),
}
RECALLS = {
    "name": Column("run"),
    "run_id": Column("run id"),
    "label": Column("class"),
    "recall": Column("recall", ".1%"),
    "low": Column("from", ".1%"),
    "high": Column("to", ".1%"),
    "images": Column("images", ",.0f"),
}


def build_comparison(records: Sequence[Record]) -> Comparison:
    """Compare records in tables and figures, and render the page."""
    groups, unevaluated = group_by_test(records)
    ordered = [record for group in groups for record in group.ranked] + unevaluated
    parts = [_compare_group(group) for group in groups]
    figures = {
        f"{name}_{number}": png
        for number, part in enumerate(parts, start=1)
        for name, png in part["figures"].items()
    }
    if drawn := draw_curves(ordered):
        figures["learning_curves"] = draw_png(drawn)
    differences = tabulate_differences(ordered)
    tables = {
        "runs": tabulate_runs(ordered),
        "differences": differences.rename_axis("field").reset_index(),
        "pairs": _concat([part["pairs"] for part in parts]),
        "recalls": _concat([part["recalls"] for part in parts]),
    }
    by_run = differences.T.reset_index(drop=True)
    by_run.insert(0, "run", [f"{each.name} {each.run_id}" for each in ordered])
    page = _render(
        records=ordered,
        parts=parts,
        curves=figures.get("learning_curves"),
        runs=tables["runs"],
        differences=by_run,
        fields={name: Column(str(name)) for name in by_run},
    )
    return Comparison(page=page, tables=tables, figures=figures)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the page, a CSV file for each table, and a PNG file for each figure."""
    (folder / "figures").mkdir(parents=True)
    (folder / REPORT_FILE).write_text(comparison.page, encoding="utf-8")
    for name, table in comparison.tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    for name, figure in comparison.figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(figure)


def _concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [table for table in tables if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _compare_group(group: Group) -> dict[str, Any]:
    """What the page shows of runs that were evaluated on the same images."""
    pairs, recalls, front = tabulate_pairs(group), tabulate_recalls(group), find_pareto_front(group)
    figures = {"accuracy_and_time": draw_scatter(group, front)}
    if not recalls.empty:
        figures["recalls"] = draw_recalls(group, recalls)
        figures["confusion_matrices"] = draw_confusions(group)
    gallery = None
    if len(group.with_predictions) >= 2:
        (first, _), (second, _) = group.with_predictions[:2]
        images = find_disagreements(first, second, GALLERY_IMAGES).to_dict("records")
        gallery = {"first": first, "second": second, "images": images}
    return {
        "group": group,
        "front": front,
        "pairs": pairs,
        "differing": 0 if pairs.empty else int((pairs["p_corrected"] < ALPHA).sum()),
        "recalls": recalls,
        "figures": {name: draw_png(figure) for name, figure in figures.items()},
        "gallery": gallery,
    }


def _render(**values: Any) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"show": _format_cell, "png_uri": png_uri}
    environment.globals |= {
        "ALPHA": ALPHA,
        "GALLERY_IMAGES": GALLERY_IMAGES,
        "MOST_DRAWN": MOST_DRAWN,
        "PAIRS": PAIRS,
        "RECALLS": RECALLS,
        "RUNS": RUNS,
        "picture_uri": picture_uri,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(**values)


def _format_cell(value: Any, form: str = "", factor: float = 1) -> str:
    """A value as text, or as a number in `form`; MISSING if it is unknown or empty."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    return format(factor * value, form) if form else str(value)


def picture_uri(root: str | None, path: str) -> str:
    """Return the thumbnail of an image as a data URI; "" if it is not on this machine, or is
    outside of `root`.
    """
    if root is None or Path(path).is_absolute() or ".." in Path(path).parts:
        return ""
    return thumbnail_uri(Path(root) / path)
