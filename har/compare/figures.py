"""Figures that compare several trainings, as Matplotlib objects.

Names come from the data, so `parse_math=False` keeps a dollar sign from starting a formula.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from har.compare.ablation import Effect
from har.compare.tables import Group
from har.data.pictures import one_line
from har.evaluation.metrics import most_confused
from har.tracking.records import Record

# A figure with more runs or classes than this cannot be read, and takes gigabytes to draw. The
# tables have all of them.
MOST_DRAWN = 12
MOST_CLASSES = 30


def _short_name(record: Record) -> str:
    """The run's name, with the start of its id to tell equal names apart."""
    # Matplotlib hides a label that starts with _
    return f"{one_line(record.name, 30).lstrip('_')} {record.run_id[:6]}"


def draw_scatter(group: Group, front: Sequence[Record]) -> Figure:
    """Draw accuracy with its interval against wall time, and the Pareto front."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    timed = [each for each in group.ranked if each.seconds]
    for number, each in enumerate(timed):
        assert each.accuracy is not None and each.seconds is not None
        low = each.test_metrics.get("accuracy_low", each.accuracy)
        high = each.test_metrics.get("accuracy_high", each.accuracy)
        label = _short_name(each) + (" (cache hit)" if each.cache_hit else "")
        axes.errorbar(
            [each.seconds],
            [each.accuracy],
            yerr=[[each.accuracy - low], [high - each.accuracy]],
            fmt="s" if each.cache_hit else "o",
            capsize=3,
            label=label if number < MOST_DRAWN else None,
        )
    if front:
        times = [each.seconds or 0.0 for each in front]
        best = [each.accuracy or 0.0 for each in front]
        axes.step(times, best, where="post", color="0.5", linestyle="--", label="Pareto front")
    axes.set(xlabel="wall time, s (logarithmic)", ylabel="test accuracy", xscale="log")
    plain = StrMethodFormatter("{x:,.0f}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)
    axes.grid(alpha=0.3)
    _draw_legend(figure, loc="outside right upper")
    return figure


def _draw_legend(figure: Figure, **where: Any) -> None:
    """The figure's legend, if any of its axes has labels."""
    if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
        for label in figure.legend(fontsize=8, **where).get_texts():
            label.set_parse_math(False)


def draw_curves(records: Sequence[Record]) -> Figure | None:
    """Draw validation (or else training) accuracy by epoch and by seconds; None without history."""
    needed = {"train_accuracy", "epoch_time_s"}
    drawn = [each for each in records if each.history and needed <= set(each.history[0])]
    drawn = drawn[:MOST_DRAWN]
    if not drawn:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_epoch, by_seconds = figure.subplots(1, 2, sharey=True)
    for each in drawn:
        validated = "val_accuracy" in each.history[0]
        name = "val_accuracy" if validated else "train_accuracy"
        values = [epoch[name] for epoch in each.history]
        seconds = pd.Series([epoch["epoch_time_s"] for epoch in each.history]).cumsum()
        label = _short_name(each) + ("" if validated else ", TRAINING images")
        style: Any = {"marker": ".", "linestyle": "-" if validated else ":"}
        by_epoch.plot(range(1, len(values) + 1), values, label=label, **style)
        by_seconds.plot(seconds, values, **style)
    by_epoch.set(xlabel="epoch", ylabel="accuracy (validation; dotted: training)")
    by_seconds.set(xlabel="seconds of training")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    for axes in (by_epoch, by_seconds):
        axes.grid(alpha=0.3)
    _draw_legend(figure, loc="outside lower center", ncols=2)
    return figure


def draw_recalls(group: Group, recalls: pd.DataFrame) -> Figure:
    """Draw the recall of each run and class as a shaded cell with its percentage.

    Of more than MOST_CLASSES classes, those with the lowest mean recall are drawn.
    """
    shown = [each for each, _ in group.with_predictions][:MOST_DRAWN]
    ids = [each.run_id for each in shown]
    table = recalls[recalls["run_id"].isin(ids)]
    table = table.pivot(index="label", columns="run_id", values="recall")[ids]
    classes = len(table)
    lowest = table.mean(axis=1).sort_values(kind="stable").head(MOST_CLASSES).index
    table = table.loc[lowest.sort_values()]
    table = table.set_axis([_short_name(each) for each in shown], axis=1)
    figure = Figure(figsize=(3 + 0.9 * len(shown), 2.6 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    _draw_shares(axes, table, fontsize=8)
    for (row, column), value in np.ndenumerate(table.to_numpy()):
        style: Any = {"ha": "center", "va": "center", "color": "w" if value > 0.5 else "k"}
        axes.text(column, row, f"{100 * value:.0f}", fontsize=8, **style)
    axes.set_title("recall, %" + _say_how_many(len(table), classes, "lowest"))
    return figure


def _say_how_many(shown: int, classes: int, which: str) -> str:
    return f"; the {shown} {which} of {classes:,} classes" if shown < classes else ""


def _find_confused(group: Group) -> tuple[list[str], int]:
    """The names of the classes that the shown runs confuse most often, and how many there are."""
    both = [each[["label", "predicted"]] for _, each in group.with_predictions[:MOST_DRAWN]]
    pairs = pd.concat(both).value_counts(sort=False)
    counts = pairs.rename_axis(["label", "predicted"]).reset_index(name="count")
    names = sorted({*counts["label"], *counts["predicted"]})
    ids = {name: number for number, name in enumerate(names)}
    by_id = [counts["label"].map(ids), counts["predicted"].map(ids), counts["count"]]
    chosen = most_confused(np.column_stack(by_id), len(names), MOST_CLASSES)
    return [names[each] for each in chosen], len(names)


def draw_confusions(group: Group) -> Figure:
    """Draw a confusion matrix for each run; the shade is the share of a row, the true class.

    Of more than MOST_CLASSES classes, those are drawn that are confused most often.
    """
    shown = group.with_predictions[:MOST_DRAWN]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    names, classes = _find_confused(group)
    size = 1.6 + 0.2 * len(names)
    figure = Figure(figsize=((size + 0.4) * columns, (size + 0.5) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (record, predictions) in zip(grid, shown, strict=False):
        within = predictions[predictions[["label", "predicted"]].isin(names).all(axis=1)]
        table = pd.crosstab(within["label"], within["predicted"])
        table = table.reindex(index=names, columns=names, fill_value=0)
        images = predictions["label"].value_counts().reindex(names, fill_value=0).clip(lower=1)
        _draw_shares(axes, table.div(images, axis=0), fontsize=6)
        axes.set_title(_short_name(record), fontsize=8, parse_math=False)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    how_many = _say_how_many(len(names), classes, "most often confused")
    figure.supxlabel(f"predicted{how_many}", fontsize=9)
    figure.supylabel("true", fontsize=9)
    return figure


def _draw_shares(axes: Axes, table: pd.DataFrame, fontsize: int) -> None:
    """A table of shares as shades of blue, with its labels beside and below."""
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    below, beside = ([one_line(name, 40) for name in each] for each in (table.columns, table.index))
    turned: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": fontsize}
    axes.set_xticks(range(len(below)), below, parse_math=False, **turned)
    axes.set_yticks(range(len(beside)), beside, parse_math=False, fontsize=fontsize)


def draw_waterfall(effects: Sequence[Effect]) -> Figure:
    """Draw the wall time of an ablation from base to end: each change, by `Effect.parts`."""
    chain = [each for each in effects if each.kind == "chain"]
    known = [each for each in chain if each.before is not None and each.after is not None]
    figure = Figure(figsize=(10, 2.2 + 0.42 * len(known)), layout="constrained")
    axes = figure.subplots()
    if not known:
        axes.text(0.5, 0.5, "no change of the chain could be measured", ha="center")
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
    """A row of the waterfall: causes that add time in the upper half, others in the lower half."""
    assert effect.before is not None
    at = effect.before.wall_s
    axes.axvline(at, color="0.8", linewidth=0.5, zorder=0)
    for name, seconds in sorted(effect.parts.items(), key=lambda part: -part[1]):
        # in two halves, because bars that go back would cover those that go forward
        place = row - 0.2 if seconds > 0 else row + 0.2
        axes.barh(place, seconds, left=at, color=colours[name], height=0.38)
        at += seconds
    axes.plot([at, at], [row - 0.4, row + 0.4], color="k", linewidth=1.5)
