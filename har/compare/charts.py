"""Charts of a comparison as Vega-Lite specifications, which the page draws and answers questions
about: pointing at a mark shows its values.

Colours of text and lines are `currentColor`, so that they follow the page's.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from har.compare.tables import Group
from har.tracking.records import Record

Spec = dict[str, Any]
# A chart with more runs than this cannot be read; the tables have all of them.
MOST_RUNS, MOST_CLASSES = 20, 40
NAME_WIDTH = 34


def _label(record: Record) -> str:
    return f"{record.name[:NAME_WIDTH]} {record.run_id[:6]}"


def _build(data: list[dict[str, Any]], **parts: Any) -> Spec:
    return {
        "data": {"values": data},
        "width": "container",
        "background": None,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": {
            "view": {"stroke": None},
            "axis": {
                "labelColor": "currentColor",
                "titleColor": "currentColor",
                "domainColor": "currentColor",
                "tickColor": "currentColor",
                "gridColor": "currentColor",
                "gridOpacity": 0.15,
                "labelLimit": 260,
                "labelFontSize": 12,
                "titleFontSize": 12,
            },
            "legend": {
                "labelColor": "currentColor",
                "titleColor": "currentColor",
                "orient": "bottom",
                "columns": 2,
                "labelLimit": 280,
                "labelFontSize": 12,
            },
        },
        **parts,
    }


def _field(name: str, title: str, form: str = "", kind: str = "quantitative") -> Spec:
    return {"field": name, "type": kind, "title": title, **({"format": form} if form else {})}


RUN, HARDWARE = _field("run", "run", kind="nominal"), _field("hardware", "hardware", kind="nominal")


def chart_accuracy_and_time(group: Group, front: Sequence[Record]) -> Spec | None:
    """Chart test accuracy with its interval against wall time, and the Pareto front as steps."""
    timed = [each for each in group.ranked[:MOST_RUNS] if each.seconds]
    if not timed:
        return None
    seconds = _field("seconds", "wall time, s (logarithmic)", ",.0f")
    x = seconds | {"scale": {"type": "log", "nice": True}, "axis": {"format": "~s", "tickCount": 6}}
    scale: Spec = {"scale": {"zero": False}}
    y = _field("accuracy", "test accuracy") | {"axis": {"format": ".0%"}} | scale
    color = RUN | {"title": None}
    dashed = {"strokeDash": [4, 4], "opacity": 0.6, "color": "currentColor"}
    steps = {
        "transform": [{"filter": "datum.front"}],
        "mark": {"type": "line", "interpolate": "step-after", **dashed},
        "encoding": {"x": x, "y": y},
    }
    low = _field("low", "test accuracy") | scale
    bars = {
        "mark": {"type": "rule", "strokeWidth": 1.5},
        "encoding": {"x": x, "y": low, "y2": {"field": "high"}, "color": color},
    }
    shape = _field("time", "wall time of", kind="nominal")
    tooltip = [
        RUN,
        HARDWARE,
        *(
            _field(*each, ".1%")
            for each in (("accuracy", "accuracy"), ("low", "from"), ("high", "to"))
        ),
        _field("seconds", "wall time, s", ",.0f"),
        _field("time", "time of", kind="nominal"),
    ]
    points = {
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
        "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip, "shape": shape},
    }
    return _build([_point(each, front) for each in timed], height=320, layer=[steps, bars, points])


def _point(record: Record, front: Sequence[Record]) -> dict[str, Any]:
    return {
        "run": _label(record),
        "hardware": record.hardware,
        "seconds": record.seconds,
        "accuracy": record.accuracy,
        "low": record.test_metrics.get("accuracy_low", record.accuracy),
        "high": record.test_metrics.get("accuracy_high", record.accuracy),
        "time": "with features from the cache" if record.cache_hit else "whole job",
        "front": record in front,
    }


def chart_curves(records: Sequence[Record]) -> Spec | None:
    """Chart accuracy by epoch: on validation images, or dashed on training images."""
    rows = []
    drawn = [each for each in records if each.history and "train_accuracy" in each.history[0]]
    for each in drawn[:MOST_RUNS]:
        name = "val_accuracy" if "val_accuracy" in each.history[0] else "train_accuracy"
        seconds = 0.0
        for number, epoch in enumerate(each.history, start=1):
            seconds += epoch.get("epoch_time_s", 0.0)
            rows.append(
                {
                    "run": _label(each),
                    "epoch": number,
                    "seconds": seconds,
                    "accuracy": epoch[name],
                    "images": name.removesuffix("_accuracy").replace("val", "validation"),
                }
            )
    if not rows:
        return None
    y = _field("accuracy", "accuracy") | {"axis": {"format": ".0%"}, "scale": {"zero": False}}
    encoding = {
        "x": _field("epoch", "epoch") | {"axis": {"tickMinStep": 1, "format": "d"}},
        "y": y,
        "color": RUN | {"title": None},
        "strokeDash": _field("images", "accuracy on", kind="nominal"),
        "tooltip": [
            RUN,
            _field("epoch", "epoch", "d"),
            _field("seconds", "s of training", ",.1f"),
            _field("accuracy", "accuracy", ".1%"),
            _field("images", "of images", kind="nominal"),
        ],
    }
    return _build(rows, height=300, mark={"type": "line", "point": True}, encoding=encoding)


def chart_recalls(group: Group, recalls: pd.DataFrame) -> Spec | None:
    """Chart the recall of each class as a shaded cell for each run; of many classes the lowest."""
    shown = {each.run_id: _label(each) for each, _ in group.with_predictions[:MOST_RUNS]}
    if recalls.empty or not shown:
        return None
    lowest = recalls.groupby("label")["recall"].mean().sort_values(kind="stable")
    table = recalls[
        recalls["run_id"].isin(shown) & recalls["label"].isin(lowest.index[:MOST_CLASSES])
    ]
    rows = [
        {
            "run": shown[row["run_id"]], "class": str(row["label"])[:NAME_WIDTH],
            "recall": row["recall"], "low": row["low"], "high": row["high"],
            "images": int(row["images"]),
        }
        for row in table.to_dict("records")
    ]  # fmt: skip
    encoding = {
        "x": _field("run", "", kind="nominal") | {"axis": {"labelAngle": -40}, "sort": None},
        "y": _field("class", "", kind="nominal"),
        "color": _field("recall", "recall", ".0%") | {
            "scale": {"scheme": "blues", "domain": [0, 1]}
        },
        "tooltip": [
            RUN, _field("class", "class", kind="nominal"), _field("recall", "recall", ".1%"),
            _field("low", "from", ".1%"), _field("high", "to", ".1%"),
            _field("images", "test images", ",d"),
        ],
    }  # fmt: skip
    return _build(
        rows,
        height=20 * len({row["class"] for row in rows}),
        mark={"type": "rect"},
        encoding=encoding,
    )
