"""The comparison's page, from hostile and missing data."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from har.compare import report
from har.compare.pictures import RecordedImages
from har.compare.report import Comparison, write_comparison
from har.tracking.records import Record
from tests.compare.conftest import HOSTILE, PUBLISHED, record


def build_comparison(records: Sequence[Record]) -> Comparison:
    return report.build_comparison(records, lambda run_id: RecordedImages(root=None))


def without_library(page: str) -> str:
    """The page without the library that draws its charts."""
    return re.sub(r'(?s)<script type="module">.*</script>', "", page)


def test_hostile_names_are_shown_as_they_stand() -> None:
    page = build_comparison(
        [record("a", 30, name=HOSTILE, differs_from_variant=HOSTILE), record("b"), PUBLISHED]
    ).page
    text = without_library(page)
    assert "<script>alert" not in page and "&lt;script&gt;" in text
    # in the data of charts too
    assert "\\u003cscript\\u003ealert" in text


def test_every_id_interval_and_p_value_is_text(tmp_path: Path) -> None:
    records = [record(f"run{number}", 10 + number) for number in range(3)]
    comparison = build_comparison([*records, PUBLISHED])
    page = comparison.page
    for each in (*records, PUBLISHED):
        assert each.run_id in page
    for pair in comparison.tables["pairs"].to_dict("records"):
        assert f"{pair['p_value']:.3g}" in page and f"{100 * pair['low']:+.1f}" in page
    assert '<td class="number">40</td>' in page  # images of a pair
    assert "Most accurate on test images" in page and "://" not in without_library(page)
    assert len(page) < 3_000_000
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


def test_many_classes_make_no_larger_page() -> None:
    def of_classes(run_id: str, count: int, shift: int) -> Record:
        labels = [f"class_{number:04}" for number in range(count)]
        table = pd.DataFrame({"path": labels, "label": labels, "predicted": labels})
        table["predicted"] = table["predicted"].shift(shift, fill_value=labels[0])
        return replace(record(run_id), predictions=table)

    sizes = {}
    for count in (report.MOST_ROWS // 2, 20_000):
        found = build_comparison([of_classes("one", count, 1), of_classes("two", count, 0)])
        assert len(found.tables["recalls"]) == 2 * count
        sizes[count] = len(found.page), max(map(len, found.figures.values()))
    (small, small_figure), (large, large_figure) = sizes.values()
    assert large < 1.2 * small and large_figure < 1.2 * small_figure
    assert "The first 1000 of 40000 rows" in found.page


def test_a_figure_that_cannot_be_drawn_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    for name in ("draw_scatter", "draw_curves", "draw_recalls", "draw_confusions"):
        monkeypatch.setattr(report, name, fail)
    found = build_comparison([record("one"), record("two")])
    assert found.figures == {} and "could not be drawn" in found.page
    assert capsys.readouterr().err.count("left out: the figure") == 4


def test_columns_without_a_value_are_left_out() -> None:
    page = build_comparison([record("a"), record("b")]).page
    head = re.findall(r'<th scope="col">([^<]*)</th>', page)
    assert "wall time s" in head and "notebook min" in head
    assert "feature cache" not in head and "memory MB" not in head


def test_charts_hold_every_value_and_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    records = [record(f"run{number}", 10 + number, seconds=100.0 * number) for number in (1, 2)]
    page = build_comparison(records).page
    specs = [json.loads(text) for text in
             re.findall(r'<script type="application/json">(.*?)</script>', page)]  # fmt: skip
    assert len(specs) == 3
    for spec in specs:
        # Vega-Lite itself understands it
        assert "<svg" in vl_convert.vegalite_to_svg(spec | {"width": 600})
    values = specs[0]["data"]["values"]
    assert {each["accuracy"] for each in values} == {11 / 40, 12 / 40}


def test_how_often_test_images_were_used_is_said() -> None:
    found = report.build_comparison(
        [record("a"), record("b")], lambda run_id: RecordedImages(root=None), {"t": 42}
    )
    assert "42 evaluations in this experiment." in found.page


def test_one_recipe_on_several_kinds_of_hardware_is_one_table() -> None:
    page = build_comparison(
        [record("a", hardware="1xP100", seconds=100.0), record("b", hardware="2xT4", seconds=50.0)]
    ).page
    assert re.search(r'<th scope="row">2xT4</th>.*?<td class="number">2.00</td>', page, re.DOTALL)
