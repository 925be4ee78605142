"""Figures that show several trainings beside each other, as Matplotlib objects.

Names from the data are drawn as they stand.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from har.compare.tables import Group
from har.data.pictures import one_line
from har.tracking.records import Record

# Pictures of more runs than this cannot be read any more; the tables have all.
MOST_DRAWN = 12


def _short_name(record: Record) -> str:
    """A run's name in a picture: the first digits of its id tell equal names apart."""
    # Matplotlib takes a name that begins with _ for one that is not to be shown
    return f"{one_line(record.name, 30).lstrip('_')} {record.run_id[:6]}"


def draw_scatter(group: Group, front: Sequence[Record]) -> Figure:
    """Accuracy with its interval against wall time, and the Pareto front."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    timed = [each for each in group.ranked if each.seconds]
    for number_, each in enumerate(timed):
        assert each.accuracy is not None and each.seconds is not None
        low = each.test_metrics.get("accuracy_low", each.accuracy)
        high = each.test_metrics.get("accuracy_high", each.accuracy)
        axes.errorbar(
            [each.seconds],
            [each.accuracy],
            yerr=[[each.accuracy - low], [high - each.accuracy]],
            fmt="s" if each.cache_hit else "o",
            capsize=3,
            label=_short_name(each) + (" (cache hit)" if each.cache_hit else "")
            if number_ < MOST_DRAWN
            else None,
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
    """Names as they stand: a dollar sign is no formula. Nothing where nothing is named."""
    named = [axes for axes in figure.axes if axes.get_legend_handles_labels()[1]]
    if named:
        for label in figure.legend(fontsize=8, **where).get_texts():
            label.set_parse_math(False)


def draw_curves(records: Sequence[Record]) -> Figure | None:
    """Validation accuracy, or training accuracy where there is none, by epoch and by seconds."""
    drawn = [each for each in records if each.history][:MOST_DRAWN]
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
    """A shade for each run and class, with its number."""
    shown = [each for each in group.ranked if each.predictions is not None][:MOST_DRAWN]
    table = recalls.pivot(index="label", columns="run_id", values="recall")
    table = table[[each.run_id for each in shown]]
    figure = Figure(figsize=(3 + 0.9 * len(shown), 2.6 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    _draw_shades(axes, table, [f"{100 * value:.0f}" for value in table.to_numpy().ravel()])
    _label_axis(axes, table.index.tolist(), [_short_name(each) for each in shown])
    axes.set_title("recall, %")
    return figure


def draw_confusions(group: Group) -> Figure:
    """A matrix for each run: rows are the true classes, shade is the share of the row."""
    shown = [each for each in group.ranked if each.predictions is not None][:MOST_DRAWN]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    names = sorted({name for each in shown for name in _labels_of(each)})
    size = 1.6 + 0.2 * len(names)
    figure = Figure(figsize=((size + 0.4) * columns, (size + 0.5) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, each in zip(grid, shown, strict=False):
        assert each.predictions is not None
        table = pd.crosstab(each.predictions["label"], each.predictions["predicted"])
        table = table.reindex(index=names, columns=names, fill_value=0)
        shares = table.div(table.sum(axis=1).clip(lower=1), axis=0)
        _draw_shades(axes, shares, ["" for _ in range(shares.size)])
        _label_axis(axes, names, names, size=6)
        axes.set_title(_short_name(each), fontsize=8, parse_math=False)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("predicted", fontsize=9)
    figure.supylabel("true", fontsize=9)
    return figure


def _labels_of(record: Record) -> set[str]:
    """Every class among a record's test images and answers."""
    assert record.predictions is not None
    return set(record.predictions["label"]) | set(record.predictions["predicted"])


def _draw_shades(axes: Axes, table: pd.DataFrame, texts: Sequence[str]) -> None:
    """A table of shares as shades of blue, with a text in each cell."""
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for index, (value, label) in enumerate(zip(table.to_numpy().ravel(), texts, strict=True)):
        row, column = divmod(index, table.shape[1])
        colour = "w" if value > 0.5 else "k"
        axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=8)


def _label_axis(axes: Axes, rows: Sequence[str], columns: Sequence[str], size: int = 8) -> None:
    """Names beside and below."""
    turned: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": size}
    below, beside = ([one_line(name, 40) for name in names] for names in (columns, rows))
    axes.set_xticks(range(len(columns)), below, parse_math=False, **turned)
    axes.set_yticks(range(len(rows)), beside, parse_math=False, fontsize=size)
