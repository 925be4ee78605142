"""What `prepare` found, as pictures and one page that needs nothing else."""

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from har.data.duplicates import describe_groups
from har.data.manifest import Manifest
from har.data.pictures import figure_uri, jpeg_uri, thumbnail

TEMPLATE = Path(__file__).with_name("report.html")
REPORT_FILE = "report.html"
SAMPLES_PER_CLASS = 6
# Thumbnails are inside the page: this many groups keep it at a few MB.
MAX_GROUPS = 300
SPLIT_COLOURS = {"train": "#4c78a8", "test": "#f58518", "unused": "#bab0ac"}


def draw_class_balance(manifest: Manifest) -> Figure:
    """Images of each class, by split."""
    counts = manifest.table.groupby(["label", "split"]).size().unstack(fill_value=0)
    counts = counts.reindex(manifest.class_names)
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(counts)), layout="constrained")
    axes = figure.subplots()
    left = pd.Series(0, index=counts.index)
    names = [plain(name) for name in counts.index]
    for split in [each for each in SPLIT_COLOURS if each in counts]:
        axes.barh(names, counts[split], left=left, label=split, color=SPLIT_COLOURS[split])
        left = left + counts[split]
    axes.invert_yaxis()
    axes.set(xlabel="images", title=f"{len(manifest.table):,} images of {len(counts)} classes")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib draws as it stands: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def draw_samples(manifest: Manifest, seed: int = 0) -> Figure:
    """A row of training images for each class, unstretched."""
    names, rows = manifest.class_names, manifest.rows("train")
    figure = Figure(figsize=(1.5 + SAMPLES_PER_CLASS * 1.3, 1.1 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), SAMPLES_PER_CLASS, squeeze=False)
    for name, line in zip(names, grid, strict=True):
        of_class = rows[rows["label"] == name]
        shown = of_class.sample(min(SAMPLES_PER_CLASS, len(of_class)), random_state=seed)
        for axes in line:
            axes.axis("off")
        for axes, path in zip(line, shown["path"], strict=False):
            picture = thumbnail(manifest.root / path)
            if picture is not None:
                axes.imshow(picture)
        line[0].text(
            -0.1, 0.5, plain(name), transform=line[0].transAxes, ha="right", va="center", fontsize=9
        )
    return figure


def render_report(manifest: Manifest) -> str:
    """The page: counts, class balance, groups of copies with their pictures, leaks, what was
    dropped. Names from the data are escaped.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    groups = describe_groups(manifest.table)
    shown = list(groups.groupby("duplicate_group", sort=False))[:MAX_GROUPS]
    return template.render(
        manifest=manifest,
        summary=manifest.summary,
        balance=figure_uri(draw_class_balance(manifest)),
        samples=figure_uri(draw_samples(manifest)),
        groups=[_describe_group(manifest, rows) for _, rows in shown],
        leaks=[
            {
                "kind": leak.kind,
                "images": [
                    _picture_of(manifest, leak.test, "test"),
                    _picture_of(manifest, leak.train, "train"),
                ],
            }
            for leak in manifest.summary.leaks[:MAX_GROUPS]
        ],
    )


def _describe_group(manifest: Manifest, rows: pd.DataFrame) -> dict[str, Any]:
    """What the page shows of one group of copies."""
    first = rows.iloc[0]
    return {
        "kind": first["kind"],
        "conflicting": bool(first["conflicting"]),
        "images": [
            _picture_of(manifest, path, f"{label}, {split}")
            for path, label, split in zip(rows["path"], rows["label"], rows["split"], strict=True)
        ],
    }


def _picture_of(manifest: Manifest, path: str, note: str) -> dict[str, str]:
    """A thumbnail as a data URI ("" for a file that is gone), its path and a note."""
    picture = thumbnail(manifest.root / path)
    return {"uri": jpeg_uri(picture) if picture else "", "path": path, "note": note}
