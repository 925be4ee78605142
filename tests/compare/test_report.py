"""The comparison's page, from hostile and missing data."""

from dataclasses import replace
from pathlib import Path

import pytest

from har.compare.report import build_comparison, picture_uri, write_comparison
from tests.compare.conftest import HOSTILE, PUBLISHED, record


def test_hostile_names_are_shown_as_they_stand() -> None:
    page = build_comparison(
        [record("a", 30, name=HOSTILE, differs_from_variant=HOSTILE), record("b"), PUBLISHED]
    ).page
    assert "<script" not in page and "&lt;script&gt;" in page


def test_pictures_come_from_the_data_alone(raw: Path) -> None:
    inside = picture_uri(str(raw), "train/Image_1.jpg")
    assert inside.startswith("data:image/jpeg;base64,")
    root = str(raw / "elsewhere")
    for path in ("../train/Image_1.jpg", str(raw / "train/Image_1.jpg"), "train/Image_1.jpg"):
        assert picture_uri(root, path) == ""
    assert picture_uri(None, "train/Image_1.jpg") == ""


def test_every_id_interval_and_p_value_is_text(tmp_path: Path) -> None:
    records = [record(f"run{number}", 10 + number) for number in range(3)]
    comparison = build_comparison([*records, PUBLISHED])
    page = comparison.page
    for each in (*records, PUBLISHED):
        assert each.run_id in page
    for pair in comparison.tables["pairs"].to_dict("records"):
        assert f"{pair['p_value']:.3g}" in page and f"{100 * pair['low']:+.1f}" in page
    assert '<td class="number">40</td>' in page  # images of a pair
    assert "Do not choose a run by its test accuracy" in page and "://" not in page
    write_comparison(comparison, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.html", "runs.csv", "pairs.csv", "learning_curves.png"} <= written


@pytest.mark.parametrize("runs", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_many_runs(runs: int) -> None:
    comparison = build_comparison([record(f"run{n:03}", n % 41) for n in range(runs)])
    assert len(comparison.tables["pairs"]) == runs * (runs - 1) // 2
    assert all(f"run{n:03}" in comparison.page for n in range(runs))


def test_runs_of_which_nothing_is_known() -> None:
    bare = replace(record("bare"), recipe={}, history=[], predictions=None)
    unevaluated = replace(PUBLISHED, seconds=None)
    for records in ([bare, unevaluated], [unevaluated, unevaluated], [bare, record("full")]):
        assert "Comparison of 2 runs" in build_comparison(records).page


def test_two_runs_without_a_common_image() -> None:
    one, other = record("one"), record("other")
    assert other.predictions is not None
    elsewhere = other.predictions.assign(path="elsewhere/" + other.predictions["path"])
    page = build_comparison([one, replace(other, predictions=elsewhere)]).page
    assert "No two runs have predictions for the same images" in page and "There are none." in page
