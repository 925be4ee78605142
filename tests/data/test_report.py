"""The page and pictures of what prepare found."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.report import (
    MAX_CLASSES,
    MAX_LARGE_GROUP_PICTURES,
    MAX_NAMES,
    draw_class_balance,
    draw_samples,
    render_report,
)
from har.data.splits import Split
from har.data.summary import BadImage
from tests.fixtures import CLASSES, read_csv, write_csv

HOSTILE = "<script>alert(1)</script> $x^2$"


def conflicting(raw: Path) -> Manifest:
    """One image twice, under two labels of which one is hostile."""
    rows = [(name, HOSTILE if label == "sitting" else label) for name, label in read_csv(raw)]
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "train" / "copy.jpg")
    write_csv(raw, [*rows, ("copy.jpg", "running"), ("gone.jpg", "running")])
    (raw / "test").mkdir()
    shutil.copy(raw / "train" / "Image_9.jpg", raw / "test" / "<b>.jpg")
    return prepare(folder_source(raw, "a test"), raw.parent / "out", Split(test_fraction=0.25))


def test_page_shows_groups_leaks_and_drops_and_escapes_names(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("har.data.prepare.MAX_BAD_SHARE", 0.5)
    page = render_report(conflicting(raw))
    assert "<script>" not in page and "&lt;script&gt;" in page and "test/<b>" not in page
    assert 'class="group conflicting"' in page and "train/copy.jpg" in page
    assert "test/&lt;b&gt;.jpg" in page
    assert "gone.jpg" in page and "no such file" in page
    # two of a group, two of a leak
    assert len(re.findall("data:image/jpeg;base64", page)) == 4
    assert not re.findall(r"(src|href)=.https?:", page)


def test_page_without_copies_says_so(manifest: Manifest) -> None:
    page = render_report(manifest)
    assert page.count("<p>None.</p>") == 5
    assert manifest.dataset_digest in page


def test_a_file_that_is_gone_is_shown_as_such(raw: Path) -> None:
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "train" / "copy.jpg")
    write_csv(raw, [*read_csv(raw), ("copy.jpg", "sitting")])
    found = prepare(folder_source(raw, "a test"), raw.parent / "out", Split(test_fraction=0.25))
    (raw / "train" / "copy.jpg").unlink()
    assert "cannot be read" in render_report(found)


def test_figures_hold_every_class(manifest: Manifest) -> None:
    balance = draw_class_balance(manifest).axes[0]
    assert [label.get_text() for label in balance.get_yticklabels()] == list(CLASSES)
    lengths = sum(bar.get_width() for bar in balance.patches)
    assert lengths == len(manifest.table)
    hostile = manifest.table.assign(label=manifest.table["label"].replace("sitting", HOSTILE))
    for draw in (draw_class_balance, draw_samples):
        draw(replace(manifest, table=hostile)).canvas.draw()


def test_a_page_of_many_classes_shows_some(manifest: Manifest) -> None:
    many = manifest.table.loc[manifest.table.index.repeat(12)].reset_index(drop=True)
    # class n has at least n images; the smallest are the last of them by name
    sizes = [n for n in range(100) for _ in range(n)]
    many = many.loc[np.arange(len(sizes)) % len(many)].reset_index(drop=True)
    many["label"] = [f"class {n:02}" for n in sizes]
    many["label_id"] = sizes
    found = replace(manifest, table=many)
    balance, samples = draw_class_balance(found), draw_samples(found)
    shown = [label.get_text() for label in balance.axes[0].get_yticklabels()]
    assert len(shown) == MAX_CLASSES
    assert shown[0] == "class 99" and shown[-1] == "class 01"
    assert "99 classes, the 10 largest and the 10 smallest" in balance.axes[0].get_title()
    assert samples.get_size_inches()[1] < 40
    assert "20 of the 99 classes" in render_report(found)


def test_a_swallowing_group_comes_first_with_some_pictures(manifest: Manifest) -> None:
    table = manifest.table.assign(duplicate_group=0)
    table.loc[:3, "duplicate_group"] = [1, 1, 2, 3]
    summary = replace(manifest.summary, duplicate_groups=2, near_duplicate_groups=2)
    page = render_report(replace(manifest, table=table, summary=summary))
    title = page.index("Large groups of copies")
    assert title < page.index("Class balance") < page.index("Groups of copies</h2>")
    assert "38 images (90%), 3 labels, near copies" in page and "--duplicates exact" in page
    large = page[title : page.index("Class balance")]
    assert large.count("data:image/jpeg") == MAX_LARGE_GROUP_PICTURES
    assert "and 14 more" in large and all(f"{label}, train" in large for label in CLASSES)


def test_long_lists_are_cut(manifest: Manifest) -> None:
    bad = BadImage("Training_set.csv", 1, "a.jpg", "empty: 0 bytes")
    names = tuple(f"stray {n}.jpg" for n in range(1500))
    summary = replace(
        manifest.summary,
        strays=names,
        dropped=(bad,) * 1500,
        blank=("black.jpg",),
        notes=("A note.",),
    )
    page = render_report(replace(manifest, summary=summary))
    assert page.count("dataset.json lists 1,300 more.") == 2
    assert page.count("empty: 0 bytes") == page.count("<li>stray") == MAX_NAMES
    assert "A note." in page and "<li>black.jpg</li>" in page


def test_a_page_without_a_test_split(raw: Path) -> None:
    found = prepare(folder_source(raw, "a test"), raw.parent / "out", Split(test_fraction=0))
    assert "0% of the images of each class" in render_report(found)
