"""The report of a comparison: one HTML page without external files, its tables and figures."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from har.compare import charts, hardware, tables
from har.compare.answers import find_answers
from har.compare.figures import draw_confusions, draw_curves, draw_recalls, draw_scatter
from har.compare.pictures import RecordedImages
from har.data.pictures import draw_png, render_page
from har.data.report import REPORT_FILE
from har.evaluation.metrics import TEST_METRICS
from har.tracking.records import Record
from har.util.errors import first_line
from har.util.escaping import format_csv
from har.util.progress import warn

FindImages = Callable[[str], RecordedImages]
TEMPLATE = Path(__file__).with_name("report.html")
GALLERY_IMAGES = 12
# Longer tables are cut on the page, which stays a few MB; the CSV files have every row.
MOST_ROWS, MOST_FAMILIES = 1000, 50
# Pairs of runs with a corrected p-value below this count as different.
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The page, and its tables and figures (PNG) by file name."""

    page: str
    tables: dict[str, pd.DataFrame]
    figures: dict[str, bytes]


# The columns of the page's tables, each with the format of its numbers; "" means text. The test
# split's metrics stand between `run_id` and `val_accuracy`.
FORMS = {
    "runs": {
        "val_accuracy": ".1%", "train_accuracy": ".1%", "wall_time_s": ",.0f",
        "feature_cache": "", "epoch_time_s": ",.1f", "images_per_second": ",.0f",
        "epochs": ".0f", "peak_memory_mb": ",.0f", "notebook_minutes": ".0f",
        "differs_from_variant": "", "hardware": "", "precision": "", "strategy": "",
        "backbone": "", "dataset": "", "test_digest": "", "source": "",
    },
    "hardware": {
        "hardware": "", "source": "", "runs": ",d", "wall_time_s": ",.0f",
        "times_as_fast": ".2f", "images_per_second": ",.0f", "epoch_time_s": ",.1f",
        "accuracy": ".1%", "accuracy_low": ".1%", "accuracy_high": ".1%",
        "of_time_an_image": "+,.0f", "of_number_of_images": "+,.0f",
        "of_before_and_after_fit": "+,.0f",
    },
    "pairs": {
        "first_name": "", "first": "", "second_name": "", "second": "", "images": ",.0f",
        "difference": "+.1f", "low": "+.1f", "high": "+.1f", "only_first": ",.0f",
        "only_second": ",.0f", "p_value": ".3g", "p_corrected": ".3g",
    },
    "recalls": {
        "name": "", "run_id": "", "label": "", "recall": ".1%", "low": ".1%", "high": ".1%",
        "images": ",.0f",
    },
}  # fmt: skip
ID_COLUMNS = ("run_id", "first", "second", "test_digest")
# Headings of columns; the others have their names.
HEADINGS = {
    "name": "run", "run_id": "run id", "val_accuracy": "validation", "train_accuracy": "training",
    "wall_time_s": "wall time s", "feature_cache": "feature cache", "epoch_time_s": "epoch s",
    "images_per_second": "images/s", "peak_memory_mb": "memory MB",
    "notebook_minutes": "notebook min", "differs_from_variant": "differs from its variant",
    "test_digest": "test digest", "first_name": "first", "first": "its run id",
    "second_name": "second", "second": "its run id", "low": "from", "high": "to",
    "only_first": "only first right", "only_second": "only second right", "p_value": "p",
    "p_corrected": "p corrected", "label": "class", "times_as_fast": "times as fast",
    "of_time_an_image": "s by time an image", "of_number_of_images": "s by number of images",
    "of_before_and_after_fit": "s before and after fit",
}  # fmt: skip


def _list_forms() -> dict[str, dict[str, str]]:
    metrics = {name: each.form for name, each in TEST_METRICS.items()}
    return FORMS | {"runs": {"name": "", "run_id": ""} | metrics | FORMS["runs"]}


def build_comparison(
    records: Sequence[Record], find_images: FindImages, looks: Mapping[str, int] | None = None
) -> Comparison:
    """Compare records in tables and figures, and render the page.

    `find_images` finds the images of a run by its id; of each ranking it is asked for one run.
    `looks` counts the evaluations on the test images of each digest.
    """
    groups, unevaluated = tables.group_by_test(records)
    ordered = [record for group in groups for record in group.ranked] + unevaluated
    parts = [
        _compare_group(each, find_images, (looks or {}).get(each.test_digest, 0)) for each in groups
    ]
    figures = {
        f"{name}_{number}": png
        for number, part in enumerate(parts, start=1)
        for name, png in part["figures"].items()
    }
    figures |= _draw_all({"learning_curves": lambda: draw_curves(ordered)})
    by_name, by_run = _tabulate(ordered, parts)
    page = render_page(
        TEMPLATE,
        records=ordered,
        parts=parts,
        families=hardware.find_families(ordered),
        curves=charts.chart_curves(ordered),
        runs=by_name["runs"],
        differences=by_run,
        forms={**_list_forms(), "fields": dict.fromkeys(by_run, "")},
        headings=HEADINGS | {name: each.heading for name, each in TEST_METRICS.items()},
        limits={
            "alpha": ALPHA, "gallery": GALLERY_IMAGES, "rows": MOST_ROWS,
            "charted": charts.MOST_RUNS, "families": MOST_FAMILIES,
        },
        show=_format_cell,
        ids=ID_COLUMNS,
        used=_drop_empty,
        as_json=_as_json,
        script=_build_script(),
    )  # fmt: skip
    return Comparison(page=page, tables=by_name, figures=figures)


def _tabulate(
    records: Sequence[Record], parts: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Return the tables by file name, and that of the recipes with a row for each run."""
    differences = tables.tabulate_differences(records)
    by_run = differences.T.reset_index(drop=True)
    by_run.insert(0, "run", [f"{each.name} ({each.run_id[:8]})" for each in records])
    by_name = {
        "runs": tables.tabulate_runs(records),
        "differences": differences.rename_axis("field").reset_index(),
        "pairs": _concat([part["pairs"] for part in parts]),
        "recalls": _concat([part["recalls"] for part in parts]),
    }
    return by_name, by_run


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the page, a CSV file for each table, and a PNG file for each figure."""
    (folder / "figures").mkdir(parents=True)
    (folder / REPORT_FILE).write_text(comparison.page, encoding="utf-8")
    for name, table in comparison.tables.items():
        (folder / f"{name}.csv").write_text(format_csv(table), encoding="utf-8")
    for name, figure in comparison.figures.items():
        (folder / "figures" / f"{name}.png").write_bytes(figure)


def _concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [table for table in parts if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _draw_all(drawings: Mapping[str, Callable[[], Figure | None]]) -> dict[str, bytes]:
    """Draw figures as PNG files; a figure that cannot be drawn is left out with a warning."""
    found = {}
    for name, draw in drawings.items():
        try:
            if (figure := draw()) is not None:
                found[name] = draw_png(figure)
        # numbers of others, or too little memory: the tables are worth more than a picture
        except Exception as error:
            warn(f"left out: the figure {name}: {first_line(error)}")
    return found


def _compare_group(group: tables.Group, find_images: FindImages, looks: int) -> dict[str, Any]:
    """What the page shows of runs that were evaluated on the same images."""
    pairs, recalls = tables.tabulate_pairs(group), tables.tabulate_recalls(group)
    front, points, gallery = tables.find_pareto_front(group), pairs, None
    if not pairs.empty:
        points = pairs.assign(**100 * pairs[["difference", "low", "high"]])
    drawings: dict[str, Callable[[], Figure]] = {
        "accuracy_and_time": lambda: draw_scatter(group, front)
    }
    if not recalls.empty:
        drawings["recalls"] = lambda: draw_recalls(group, recalls)
        drawings["confusion_matrices"] = lambda: draw_confusions(group)
    if len(group.with_predictions) >= 2:
        (first, _), (second, _) = group.with_predictions[:2]
        gallery = _build_gallery(first, second, find_images)
    return {
        "group": group,
        "answers": find_answers(group, front, looks),
        "charts": {
            "accuracy_and_time": charts.chart_accuracy_and_time(group, front),
            "recalls": charts.chart_recalls(group, recalls),
        },
        "pairs": pairs,
        "pairs_in_points": points,
        "differing": 0 if pairs.empty else int((pairs["p_corrected"] < ALPHA).sum()),
        "recalls": recalls,
        "figures": _draw_all(drawings),
        "gallery": gallery,
    }


def _build_gallery(first: Record, second: Record, find_images: FindImages) -> dict[str, Any]:
    images: Any = tables.find_disagreements(first, second, GALLERY_IMAGES).to_dict("records")
    recorded = find_images(first.run_id) if images else None
    for each in images:
        each["uri"] = recorded.thumbnail_uri(each["path"]) if recorded else ""
    return {"first": first, "second": second, "images": images}


def _format_cell(value: Any, form: str = "") -> str:
    """A value as text, or as a number in `form`; `-` if it is unknown or empty."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return tables.MISSING
    return format(value, form) if form else str(value)


def _drop_empty(forms: Mapping[str, str], rows: pd.DataFrame) -> dict[str, str]:
    """Return the columns of a table in which a row has something to show."""
    return {
        name: form
        for name, form in forms.items()
        if any(_format_cell(value, form) != tables.MISSING for value in rows[name])
    }


def _as_json(value: Any) -> Markup:
    """Format JSON that can stand in a page's script: nothing in it ends the script."""
    text = json.dumps(value, allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@functools.cache
def _build_script() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script, so that the page needs no network."""
    # loads a JavaScript engine
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(script.replace("</script", "<\\/script"))
