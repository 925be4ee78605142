"""Figures of one training and of one evaluation, as Matplotlib objects.

Class names come from the data, so `parse_math=False` keeps a dollar sign from starting a formula.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from har.data.pictures import one_line, thumbnail
from har.evaluation import metrics
from har.evaluation.evaluate import Evaluation

THUMBNAIL_SIZE = 240
GALLERY_COLUMNS = 6
# A figure of more classes cannot be read, and takes gigabytes to draw. The tables have all classes.
MOST_CLASSES = 30
# Limits of an axis of shares, with room for a marker at 0 and at 1.
WHOLE = (-0.02, 1.02)


def draw_confusion(evaluation: Evaluation) -> Figure:
    """Draw the confusion matrix: the numbers count images, the shade is the share of a true class.

    Of more than MOST_CLASSES classes, those are drawn that are confused most often.
    """
    pairs = metrics.confusion(evaluation.probabilities, evaluation.label_ids)
    classes = len(evaluation.class_names)
    shown = metrics.most_confused(pairs, classes, MOST_CLASSES)
    counts = _tabulate_confusion(pairs, shown)
    images = np.bincount(evaluation.label_ids, minlength=classes)[shown]
    shares = counts / np.maximum(images[:, None], 1)
    size = 2.5 + 0.42 * len(counts)
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            dark = shares[row, column] > 0.5
            axes.text(column, row, str(count), ha="center", va="center", color="w" if dark else "k")
    ticks: Any = range(len(counts))
    names = [one_line(evaluation.class_names[each]) for each in shown]
    turned: Any = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, names, parse_math=False, **turned)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    scores = evaluation.scores
    # two lines, to fit above a matrix of two classes
    figure.suptitle(
        f"{scores['accuracy']:.1%} of {len(evaluation.label_ids):,} test images correct\n"
        f"(95 % interval {scores['accuracy_low']:.1%} to {scores['accuracy_high']:.1%})"
        + _say_how_many(len(shown), classes, "most often confused")
    )
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    return figure


def _tabulate_confusion(pairs: metrics.Ints, shown: metrics.Ints) -> metrics.Ints:
    """(shown, shown) counts of the pairs of `metrics.confusion` whose classes are both shown."""
    within = pairs[np.isin(pairs[:, :2], shown).all(axis=1)]
    counts = np.zeros((len(shown), len(shown)), np.int64)
    true, predicted = np.searchsorted(shown, within[:, :2]).T
    counts[true, predicted] = within[:, 2]
    return counts


def _say_how_many(shown: int, classes: int, which: str) -> str:
    return f"\n{shown} of {classes:,} classes: the {which}" if shown < classes else ""


def draw_curves(history: list[dict[str, float]]) -> Figure:
    """Draw loss and accuracy of training and validation, by epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, label in (("train", "training"), ("val", "validation")):
            if f"{prefix}_{name}" in history[0]:
                values = [epoch[f"{prefix}_{name}"] for epoch in history]
                axes.plot(epochs, values, marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_reliability(evaluation: Evaluation) -> Figure:
    """Draw the reliability diagram: accuracy by confidence, with a histogram of confidence."""
    table = evaluation.reliability
    some = table[table["images"] > 0]
    figure = Figure(figsize=(6.4, 6.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot([0, 1], [0, 1], color="0.5", linestyle="--", label="perfect calibration")
    _draw_intervals(above, some["confidence"], some, "accuracy", vertical=True)
    above.set(ylabel="accuracy", xlim=WHOLE, ylim=WHOLE)
    width = table["confidence_to"] - table["confidence_from"]
    below.bar(table["confidence_from"], table["images"], width, align="edge", edgecolor="white")
    below.set(xlabel="confidence: probability of the predicted class", ylabel="test images")
    below.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper center", ncols=2)
    above.set_title(
        f"calibration error {evaluation.scores['calibration_error']:.1%}"
        f" on {len(evaluation.label_ids):,} test images"
    )
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


def _draw_intervals(axes: Axes, where: Any, table: Any, name: str, *, vertical: bool) -> None:
    """A point for the column `name` of each row, with a bar from `name`_low to `name`_high."""
    value = table[name]
    bars = [value - table[f"{name}_low"], table[f"{name}_high"] - value]
    style: Any = {"fmt": "o", "capsize": 3, "label": f"{name}, with 95 % interval"}
    if vertical:
        axes.errorbar(where, value, yerr=bars, **style)
    else:
        axes.errorbar(value, where, xerr=bars, **style)


def draw_class_intervals(evaluation: Evaluation) -> Figure:
    """Draw the recall of each class that has test images, the best on top.

    Of more than MOST_CLASSES classes, those with the lowest recall are drawn.
    """
    known = evaluation.per_class.query("images > 0").sort_values("recall", kind="stable")
    table = known.head(MOST_CLASSES)
    figure = Figure(figsize=(7.5, 1.6 + 0.3 * len(table)), layout="constrained")
    axes = figure.subplots()
    _draw_intervals(axes, range(len(table)), table, "recall", vertical=False)
    scores = evaluation.scores
    axes.axvspan(
        scores["accuracy_low"], scores["accuracy_high"], color="0.5", alpha=0.2, linewidth=0
    )
    axes.axvline(scores["accuracy"], color="0.5", label=f"all classes: {scores['accuracy']:.1%}")
    names = [
        f"{one_line(label)} ({images:,})"
        for label, images in zip(table["label"], table["images"], strict=True)
    ]
    ticks: Any = range(len(table))
    axes.set_yticks(ticks, names, parse_math=False)
    axes.set(
        xlabel="recall: share of the class's test images that are predicted correctly"
        + _say_how_many(len(table), len(known), "lowest recalls")
    )
    axes.set(xlim=WHOLE, ylim=(-0.6, len(table) - 0.4))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def draw_mistakes(evaluation: Evaluation, root: Path, count: int = 24) -> Figure:
    """Draw the `count` most confident mistakes with their images; `root` is the manifest's."""
    mistakes = evaluation.mistakes
    images = len(evaluation.label_ids)
    shown = mistakes.head(count)
    if mistakes.empty:
        figure = Figure(figsize=(6, 2), layout="constrained")
        figure.text(0.5, 0.5, f"no mistakes: all {images:,} test images correct", ha="center")
        return figure
    rows = -(-len(shown) // GALLERY_COLUMNS)
    figure = Figure(figsize=(2.1 * GALLERY_COLUMNS, 0.5 + 2.2 * rows), layout="constrained")
    figure.suptitle(
        f"{len(mistakes):,} of {images:,} test images wrong: the {len(shown)} most confident"
    )
    grid = figure.subplots(rows, GALLERY_COLUMNS, squeeze=False).ravel()
    for axes, mistake in zip(grid, shown.to_dict("records"), strict=False):
        # as small as it is drawn: a gallery of whole photos would take a gigabyte
        picture = thumbnail(root, mistake["path"], THUMBNAIL_SIZE)
        axes.imshow(picture or Image.new("RGB", (4, 3), "lightgrey"))
        if picture is None:
            axes.text(1.5, 1, "cannot be read", ha="center", va="center")
        label, predicted = (one_line(mistake[name], 20) for name in ("label", "predicted"))
        title = f"{label}\n-> {predicted} {100 * mistake['probability']:.0f} %"
        axes.set_title(title, fontsize=9, parse_math=False)
    for axes in grid:
        axes.set_axis_off()
        # images at the top of their cells, so that the titles of a row are at one height
        axes.set_anchor("N")
    return figure
