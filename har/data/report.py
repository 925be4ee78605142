"""The report of `prepare`: figures, and one HTML page without external files."""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from har.data.duplicates import describe_groups
from har.data.manifest import Manifest
from har.data.pictures import draw_png, one_line, render_page, thumbnail, thumbnail_uri

TEMPLATE = Path(__file__).with_name("report.html")
REPORT_FILE = "report.html"
SAMPLES_PER_CLASS = 6
# The page contains the thumbnails: with this many groups it has a few MB.
MAX_GROUPS = 300
SPLIT_COLOURS = {"train": "#4c78a8", "test": "#f58518", "unused": "#bab0ac"}


def draw_class_balance(manifest: Manifest) -> Figure:
    """Draw a bar for each class: its images, by split."""
    counts = manifest.table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(manifest.class_names)
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(counts)), layout="constrained")
    axes = figure.subplots()
    left = pd.Series(0, index=counts.index)
    rows: Any = range(len(counts))
    for split in [each for each in SPLIT_COLOURS if each in counts]:
        axes.barh(rows, counts[split], left=left, label=split, color=SPLIT_COLOURS[split])
        left = left + counts[split]
    axes.set_yticks(rows, [one_line(name) for name in counts.index], parse_math=False)
    axes.invert_yaxis()
    axes.set(xlabel="images", title=f"{len(manifest.table):,} images of {len(counts)} classes")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_samples(manifest: Manifest, seed: int = 0) -> Figure:
    """Draw a row of random training images for each class, in their own proportions."""
    names, rows = manifest.class_names, manifest.rows("train")
    figure = Figure(figsize=(1.5 + SAMPLES_PER_CLASS * 1.3, 1.1 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), SAMPLES_PER_CLASS, squeeze=False)
    for name, line in zip(names, grid, strict=True):
        of_class = rows[rows["label"] == name]
        shown = of_class.sample(min(SAMPLES_PER_CLASS, len(of_class)), random_state=seed)
        for axes in line:
            axes.axis("off")
        for axes, path in zip(line, shown["path"], strict=False):
            picture = thumbnail(manifest.root, path)
            if picture is not None:
                axes.imshow(picture)
        beside: Any = {"transform": line[0].transAxes, "ha": "right", "va": "center"}
        line[0].text(-0.1, 0.5, one_line(name), fontsize=9, parse_math=False, **beside)
    return figure


def render_report(manifest: Manifest) -> str:
    """Render the page: counts, class balance, copies with their images, leaks, dropped images."""
    groups = describe_groups(manifest.table).groupby("duplicate_group", sort=False)
    return render_page(
        TEMPLATE,
        manifest=manifest,
        summary=manifest.summary,
        balance=draw_png(draw_class_balance(manifest)),
        samples=draw_png(draw_samples(manifest)),
        groups=[group.to_dict("records") for _, group in list(groups)[:MAX_GROUPS]],
        leaks=manifest.summary.leaks[:MAX_GROUPS],
        thumbnail_uri=partial(thumbnail_uri, manifest.root),
    )
