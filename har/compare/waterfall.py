"""An ablation's wall time as a waterfall: from the base to the end, change by change."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from har.compare.ablation import Effect
from har.data.pictures import one_line


def draw_waterfall(effects: Sequence[Effect]) -> Figure:
    """From the base's wall time to the end's, change by change, each change's seconds by cause."""
    chain = [each for each in effects if each.kind == "chain"]
    known = [each for each in chain if each.before is not None and each.after is not None]
    figure = Figure(figsize=(10, 2.2 + 0.42 * len(known)), layout="constrained")
    axes = figure.subplots()
    if not known:
        axes.text(0.5, 0.5, "no change of the chain is known", ha="center")
        return figure
    first, last = known[0].before, known[-1].after
    assert first is not None and last is not None
    axes.barh(0, first.wall_s, color="0.6")
    names = [f"base: {first.wall_s:,.0f} s"]
    colours = dict(zip(known[0].parts, ("#4c78a8", "#f58518", "#bab0ac"), strict=True))
    for row, each in enumerate(known, start=1):
        _draw_causes(axes, row, each, colours)
        names.append(f"{one_line(each.change, 44)}: {sum(each.parts.values()):+,.0f} s")
    axes.barh(len(known) + 1, last.wall_s, color="0.6")
    names.append(f"end: {last.wall_s:,.0f} s")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="wall time, s")
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    handles: Any = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _draw_causes(axes: Axes, row: int, effect: Effect, colours: dict[str, str]) -> None:
    """One change: above what lengthens the wall time, to the right of where it was; below what
    shortens it, back to where it came to.
    """
    assert effect.before is not None
    at = effect.before.wall_s
    axes.axvline(at, color="0.8", linewidth=0.5, zorder=0)
    for name, seconds in sorted(effect.parts.items(), key=lambda part: -part[1]):
        # one above the other, or what shortens would hide what lengthens
        place = row - 0.2 if seconds > 0 else row + 0.2
        axes.barh(place, seconds, left=at, color=colours[name], height=0.38)
        at += seconds
    axes.plot([at, at], [row - 0.4, row + 0.4], color="k", linewidth=1.5)
