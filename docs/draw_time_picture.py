"""Draw docs/wall-time.png, the README's chart, from what benchmarks/time_to_accuracy.py wrote.

python docs/draw_time_picture.py [benchmarks/results/time_to_accuracy.json]
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from har.notebooks import NOTEBOOKS
from har.recipe import VARIANTS

DOCS = Path(__file__).parent
FOUND = DOCS.parent / "benchmarks" / "results" / "time_to_accuracy.json"
EPOCHS = 40
MEASURED, EXTRAPOLATED, PUBLISHED = "#1b6ca8", "#8fbfe0", "#8a8a8a"

Row = tuple[str, float, str]


def minutes_here(found: dict[str, Any]) -> list[Row]:
    """Label, minutes and colour of each way on the machine that was measured on."""
    speed, scale = found["speed"], found["scale"]
    images, loop = scale["job_images"], speed["loop"]
    factor = images / loop["images"]
    decode_s, epoch_s = statistics.median(loop["decode_s"]), statistics.median(loop["epoch_s"])
    loop_s = factor * (decode_s + EPOCHS * epoch_s)
    rows = [("notebook's loop, 40 epochs", loop_s, EXTRAPOLATED)]
    for name in ("original", "v3"):
        # 15 % are test, and a share of the rest is validation
        trained = images * 0.85 * (1 - VARIANTS[name].validation_fraction)
        rows.append(
            (f"{name}, 40 epochs", EPOCHS * trained / speed[name]["rates"][-1], EXTRAPOLATED)
        )
    for runtime, run in speed["v5"].items():
        rows.append((f"v5, {runtime}", run["wall_time_s"], MEASURED))
    return [(label, seconds / 60, colour) for label, seconds, colour in rows]


def draw(found: dict[str, Any]) -> Figure:
    """One dot a row on a logarithmic axis, its minutes beside it."""
    machine = found["machine"]
    here = minutes_here(found)
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
        f"EfficientNetB7 at 160 px, {found['scale']['job_images']:,} images\n"
        f"above: {cores}; dark measured, light extrapolated from measured epochs\n"
        "below: other hardware, as the notebooks published",
        fontsize=10,
        loc="left",
    )
    return figure


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FOUND
    draw(json.loads(path.read_text())).savefig(DOCS / "wall-time.png", dpi=110)
