"""The report of `prepare`: figures, and one HTML page without external files."""

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from har.data.duplicates import describe_groups, find_large_groups
from har.data.manifest import Manifest
from har.data.pictures import draw_png, one_line, render_page, thumbnail, thumbnail_uri

TEMPLATE = Path(__file__).with_name("report.html")
REPORT_FILE = "report.html"
SAMPLES_PER_CLASS = 6
# What the page shows at most: so it has a few MB whatever the data. Files beside it list the rest.
MAX_CLASSES = 20
MAX_LARGE_GROUPS, MAX_LARGE_GROUP_PICTURES = 3, 24
MAX_GROUPS, MAX_GROUP_PICTURES = 150, 6
MAX_NAMES = 200
SPLIT_COLOURS = {"train": "#4c78a8", "test": "#f58518", "unused": "#bab0ac"}


def _choose_classes(manifest: Manifest) -> list[str]:
    """All classes by id; of too many, those with most and with fewest images, by size."""
    names = list(manifest.class_names)
    if len(names) <= MAX_CLASSES:
        return names
    by_size = manifest.table["label"].value_counts().index.tolist()
    half = MAX_CLASSES // 2
    return by_size[:half] + by_size[-half:]


def draw_class_balance(manifest: Manifest) -> Figure:
    """Draw a bar for each class: its images, by split. Of many classes only some are shown."""
    counts = manifest.table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(_choose_classes(manifest))
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(counts)), layout="constrained")
    axes = figure.subplots()
    left = pd.Series(0, index=counts.index)
    rows: Any = range(len(counts))
    for split in [each for each in SPLIT_COLOURS if each in counts]:
        axes.barh(rows, counts[split], left=left, label=split, color=SPLIT_COLOURS[split])
        left = left + counts[split]
    axes.set_yticks(rows, [one_line(name) for name in counts.index], parse_math=False)
    axes.invert_yaxis()
    classes = f"{len(manifest.class_names):,} classes"
    if len(manifest.class_names) > len(counts):
        classes += f", the {len(counts) // 2} largest and the {len(counts) // 2} smallest"
    axes.set(xlabel="images", title=f"{len(manifest.table):,} images of {classes}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_samples(manifest: Manifest, seed: int = 0) -> Figure:
    """Draw a row of random training images for each class that `draw_class_balance` shows."""
    names, rows = _choose_classes(manifest), manifest.rows("train")
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
    """Render the page: counts, class balance, copies with their images, what is left out."""
    large = find_large_groups(manifest.table)["duplicate_group"].tolist()
    copies = describe_groups(manifest.table)
    some = copies["duplicate_group"].unique()[:MAX_GROUPS].tolist()
    return render_page(
        TEMPLATE,
        manifest=manifest,
        summary=manifest.summary,
        balance=draw_png(draw_class_balance(manifest)),
        samples=draw_png(draw_samples(manifest)),
        classes_shown=len(_choose_classes(manifest)),
        large_groups=_describe(copies, large[:MAX_LARGE_GROUPS], MAX_LARGE_GROUP_PICTURES),
        large_groups_found=len(large),
        groups=_describe(copies, some, MAX_GROUP_PICTURES),
        leaks=manifest.summary.leaks[:MAX_GROUPS],
        max_names=MAX_NAMES,
        thumbnail_uri=partial(thumbnail_uri, manifest.root),
    )


def _describe(copies: pd.DataFrame, groups: list[int], pictures: int) -> list[dict[str, Any]]:
    """Facts of some groups of `describe_groups`, with the rows of some of their images."""
    rows_of = dict(list(copies[copies["duplicate_group"].isin(groups)].groupby("duplicate_group")))
    return [
        {
            "kind": rows["kind"].iloc[0],
            "conflicting": rows["conflicting"].iloc[0],
            "images": len(rows),
            "labels": rows["label"].nunique(),
            "shown": _choose_rows(rows, pictures).to_dict("records"),
        }
        for rows in (rows_of[group] for group in groups)
    ]


def _choose_rows(rows: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first images of each label in turn, sorted by label."""
    turns = rows.groupby("label").cumcount().sort_values(kind="stable")
    return rows.loc[turns.index[:count]].sort_values("label", kind="stable")
