"""Draw docs/wall-time.png, the README's chart, from what benchmarks/time_to_accuracy.py wrote.

python docs/draw_time_picture.py [benchmarks/results/time_to_accuracy.json]
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from har.notebooks import NOTEBOOKS

DOCS = Path(__file__).parent
FOUND = DOCS.parent / "benchmarks" / "results" / "time_to_accuracy.json"
MEASURED, EXTRAPOLATED, PUBLISHED = "#1b6ca8", "#8fbfe0", "#8a8a8a"

Row = tuple[str, float, str]


def rows_here(measured: list[dict[str, Any]]) -> list[Row]:
    """Return label, minutes and colour of each whole job on the machine that was measured."""
    rows = []
    for ending, colour in ((" (extrapolated)", EXTRAPOLATED), (", whole job", MEASURED)):
        ways = [row for row in measured if row["name"].endswith(ending)]
        rows += [(row["name"].removesuffix(ending), row["minutes"], colour) for row in ways]
    return rows


def draw(found: dict[str, Any]) -> Figure:
    """Draw one dot a row on a logarithmic axis, with its minutes beside it."""
    machine = found["machine"]
    # backbone and images, and the rows: the first table
    title, measured = next(iter(found["tables"].items()))
    here = rows_here(measured)
    there = [
        (f"{name}, {each.hardware}", float(each.minutes), PUBLISHED)
        for name, each in NOTEBOOKS.items()
    ]
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.subplots()
    rows = [*here, *there]
    for y, (_, minutes, colour) in enumerate(rows):
        axes.plot(minutes, y, "o", color=colour, markersize=9)
        axes.annotate(
            f"{minutes:,.1f} min" if colour != PUBLISHED else f"{minutes:.0f} min",
            (minutes, y),
            xytext=(9, -4),
            textcoords="offset points",
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.axhline(len(here) - 0.5, color="#cccccc", linewidth=1)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(1, 2000)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("minutes, logarithmic")
    axes.grid(axis="x", color="#eeeeee")
    cores = f"{machine['cores']} CPU cores ({machine['cpu']})"
    axes.set_title(
        f"{title}, at 160 px\n"
        f"above: {cores}; dark measured, light extrapolated from measured epochs\n"
        "below: other hardware, as the notebooks published",
        fontsize=10,
        loc="left",
    )
    return figure


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FOUND
    draw(json.loads(path.read_text())).savefig(DOCS / "wall-time.png", dpi=110)
