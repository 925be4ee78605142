"""The page and pictures of what prepare found."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.report import draw_class_balance, draw_samples, render_report
from har.data.sources import folder_source
from har.data.splits import Split
from tests.conftest import CLASSES, read_csv, write_csv

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
    assert page.count("<p>None.</p>") == 4
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
