"""A comparison as one page that needs nothing else, with its tables and pictures as files.

Names from the data are drawn and written as they stand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The page, and by file name the tables and the figures (PNG) in it."""

    page: str
    tables: dict[str, pd.DataFrame]
    figures: dict[str, bytes]


def build_comparison(records: Sequence[Record]) -> Comparison:
    """Everything of one comparison."""
    groups, unevaluated = group_by_test(records)
    ordered = [record for group in groups for record in group.ranked] + unevaluated
    parts = [_describe_group(group) for group in groups]
    figures = {
        f"{name}_{number_}": figure
        for number_, part in enumerate(parts, start=1)
        for name, figure in part["figures"]
    }
    drawn = draw_curves(ordered)
    curves = draw_png(drawn) if drawn else None
    if curves:
        figures["learning_curves"] = curves
    pairs, recalls = ([part[name] for part in parts] for name in ("pair_table", "recall_table"))
    tables = {
        "runs": tabulate_runs(ordered),
        "differences": tabulate_differences(ordered).rename_axis("field").reset_index(),
        "pairs": _concat(pairs),
        "recalls": _concat(recalls),
    }
    return Comparison(page=_render(ordered, parts, curves, tables), tables=tables, figures=figures)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Into a new folder: the page, a CSV file for each table, a PNG file for each figure."""
    (folder / "figures").mkdir(parents=True)
    (folder / REPORT_FILE).write_text(comparison.page, encoding="utf-8")
    for name, table in comparison.tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    for name, figure in comparison.figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(figure)


def _concat(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One under the other, without the empty ones."""
    filled = [table for table in tables if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _render(
    records: Sequence[Record],
    parts: Sequence[dict[str, Any]],
    curves: bytes | None,
    tables: dict[str, pd.DataFrame],
) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    published = sum(each.published for each in records)
    counts = f"{len(records) - published} measured and {published} published runs"
    if len(parts) > 1:
        counts += (
            f", evaluated on {len(parts)} different sets of test images: each set has its ranking"
        )
    note = "" if len(records) <= MOST_DRAWN else f"The first {MOST_DRAWN} runs of the table."
    return template.render(
        title=f"Comparison of {len(records)} runs",
        counts=counts + ".",
        runs=_render_table(
            "All runs, those evaluated on the same images together", tables["runs"], _run_columns()
        ),
        differences=_differences_table(records, tables["differences"]),
        curves=_render_figure(curves, "Accuracy by epoch and by seconds of training", note)
        if curves
        else None,
        groups=parts,
    )


def number_format(form: str, factor: float = 1.0) -> Callable[[Any], str]:
    """Formats a number, and what is missing as MISSING."""

    def shown(value: Any) -> str:
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return MISSING if missing else format(factor * value, form)

    return shown


def format_text(value: Any) -> str:
    """As it stands; what is missing or empty as MISSING."""
    missing = value is None or value == "" or (isinstance(value, float) and math.isnan(value))
    return MISSING if missing else str(value)


PERCENT, POINTS, PROBABILITY = (
    number_format(".1%"),
    number_format("+.1f", 100),
    number_format(".3g"),
)
# Column of a table to its heading and how it is shown.
Columns = dict[str, tuple[str, Callable[[Any], str]]]
PAIRS: Columns = {
    "first_name": ("first", format_text),
    "first": ("its run id", format_text),
    "second_name": ("second", format_text),
    "second": ("its run id", format_text),
    "images": ("images", number_format(",.0f")),
    "difference": ("difference", POINTS),
    "low": ("from", POINTS),
    "high": ("to", POINTS),
    "only_first": ("only first right", number_format(",.0f")),
    "only_second": ("only second right", number_format(",.0f")),
    "p_value": ("p", PROBABILITY),
    "p_corrected": ("p corrected", PROBABILITY),
}
RECALLS: Columns = {
    "name": ("run", format_text),
    "run_id": ("run id", format_text),
    "label": ("class", format_text),
    "recall": ("recall", PERCENT),
    "low": ("from", PERCENT),
    "high": ("to", PERCENT),
    "images": ("images", number_format(",.0f")),
}


def _run_columns() -> Columns:
    """Of the table of runs: every metric of the test split has one."""
    metrics = {n: (each.heading, number_format(each.form)) for n, each in TEST_METRICS.items()}
    return {
        "name": ("run", format_text),
        "run_id": ("run id", format_text),
        **metrics,
        "val_accuracy": ("validation", PERCENT),
        "train_accuracy": ("training", PERCENT),
        "wall_time_s": ("wall time s", number_format(",.0f")),
        "feature_cache": ("feature cache", format_text),
        "epoch_time_s": ("epoch s", number_format(",.1f")),
        "images_per_second": ("images/s", number_format(",.0f")),
        "epochs": ("epochs", number_format(".0f")),
        "peak_memory_mb": ("memory MB", number_format(",.0f")),
        "notebook_minutes": ("notebook min", number_format(".0f")),
        "differs_from_variant": ("differs from its variant", format_text),
        "hardware": ("hardware", format_text),
        "precision": ("precision", format_text),
        "strategy": ("strategy", format_text),
        "backbone": ("backbone", format_text),
        "dataset": ("dataset", format_text),
        "test_digest": ("test digest", format_text),
        "source": ("source", format_text),
    }


def _render_table(caption: str, table: pd.DataFrame, columns: Columns) -> dict[str, Any]:
    """For the template: every cell as text."""
    rows = [
        [shown(row[name]) for name, (_, shown) in columns.items()]
        for row in table.to_dict("records")
    ]
    return {
        "caption": caption,
        "columns": [heading for heading, _ in columns.values()],
        "numeric": [shown is not format_text for _, shown in columns.values()],
        "rows": rows,
    }


def _differences_table(records: Sequence[Record], table: pd.DataFrame) -> dict[str, Any]:
    """One row a run, since there may be many more runs than fields."""
    names = table["field"].tolist()
    by_run = table.set_index("field").T if names else pd.DataFrame()
    rows = [
        [
            f"{each.name} {each.run_id}",
            *map(format_text, by_run.loc[each.run_id]),
        ]
        for each in records
        if names
    ]
    return {
        "caption": "Recipe fields, as used, that are not the same in all runs",
        "columns": ["run", *names],
        "numeric": [False] * (1 + len(names)),
        "rows": rows,
    }


def _describe_group(group: Group) -> dict[str, Any]:
    """What the template shows of the runs that were evaluated on the same images."""
    pair_table, recall_table = tabulate_pairs(group), tabulate_recalls(group)
    front = find_pareto_front(group)
    figures = [("accuracy_and_time", draw_scatter(group, front))]
    if not recall_table.empty:
        figures += [
            ("recalls", draw_recalls(group, recall_table)),
            ("confusion_matrices", draw_confusions(group)),
        ]
    drawn = {name: draw_png(figure) for name, figure in figures}
    return {
        "digest": group.test_digest,
        "figures": drawn.items(),
        "pair_table": pair_table,
        "recall_table": recall_table,
        "summary": _summarise(group),
        "warning": _describe_selection_bias(group),
        "front": _describe_front(front),
        "scatter": _render_figure(drawn["accuracy_and_time"], "Test accuracy against wall time"),
        "pairs": _render_table("Paired differences of test accuracy", pair_table, PAIRS),
        "pair_summary": _summarise_pairs(pair_table),
        "recalls": _render_table("Recall of each class, by run", recall_table, RECALLS),
        "recall_picture": _render_figure(drawn.get("recalls"), "Recall of each class, by run"),
        "confusions": _render_figure(
            drawn.get("confusion_matrices"), "Confusion matrices side by side"
        ),
        "gallery": _build_gallery(group),
    }


def _format_run(record: Record) -> str:
    """A run as the text speaks of it."""
    return f"{record.name} ({record.run_id})"


def _summarise(group: Group) -> str:
    """How many runs, and the best."""
    best = group.ranked[0]
    return (
        f"{len(group.ranked)} runs. The highest test accuracy: {_format_run(best)},"
        f" {PERCENT(best.accuracy)} ({PERCENT(best.test_metrics.get('accuracy_low'))} to"
        f" {PERCENT(best.test_metrics.get('accuracy_high'))})."
    )


def _describe_selection_bias(group: Group) -> str:
    """Choosing by this table is choosing on test; what a fair choice would be."""
    warning = (
        "Whoever picks a run by its test accuracy chooses on test: the accuracy of the run that is"
        " picked so flatters it, the more the more runs there are."
    )
    validated = [each for each in group.ranked if each.val_accuracy is not None]
    if not validated:
        return warning + " None of these runs has a validation accuracy to choose by."
    best = max(validated, key=lambda each: each.val_accuracy or 0.0)
    return (
        f"{warning} By validation accuracy ({PERCENT(best.val_accuracy)}) the choice would be"
        f" {_format_run(best)}, with {PERCENT(best.accuracy)} on test."
    )


def _describe_front(front: Sequence[Record]) -> str:
    """The Pareto front in words."""
    if not front:
        return "No run has a wall time that can be compared."
    each = "; ".join(
        f"{_format_run(record)}: {record.seconds:,.0f} s, {PERCENT(record.accuracy)}"
        for record in front
    )
    return f"No run is both quicker and better than these: {each}."


def _summarise_pairs(pairs: pd.DataFrame) -> str:
    """How many differ."""
    if pairs.empty:
        return ""
    many = int((pairs["p_corrected"] < ALPHA).sum())
    return f"{many} of {len(pairs)} pairs differ (corrected p below {ALPHA:g})."


def _render_figure(png: bytes | None, alt: str, note: str = "") -> dict[str, str] | None:
    """For the template."""
    return {"uri": png_uri(png), "alt": alt, "note": note} if png else None


def _build_gallery(group: Group) -> dict[str, Any] | None:
    """Pictures on which the two best runs disagree; None for fewer than two."""
    evaluated = [each for each in group.ranked if each.predictions is not None]
    if len(evaluated) < 2:
        return None
    first, second = evaluated[:2]
    table = find_disagreements(first, second, GALLERY_IMAGES)
    images = []
    for row in table.to_dict("records"):
        images.append({**row, "uri": picture_uri(first.root, Path(row["path"]))})
    return {
        "title": (
            f"Only one of the two is right. First: {_format_run(first)}; second:"
            f" {_format_run(second)}. At most {GALLERY_IMAGES} images of either kind"
            f"{'' if images else '; there are none'}."
        ),
        "images": images,
    }


def picture_uri(root: str | None, path: Path) -> str:
    """The image as a thumbnail; "" where it is not on this machine, or not inside `root`."""
    if root is None or path.is_absolute() or ".." in path.parts:
        return ""
    return thumbnail_uri(Path(root) / path)
