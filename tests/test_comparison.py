"""Tables of a comparison, by hand; the report, from hostile and missing data, and in a browser."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_twins import HERE

from har.archive import Record
from har.comparison import (
    find_disagreements,
    find_pareto_front,
    group_by_test,
    run_row,
    tabulate_differences,
    tabulate_pairs,
    tabulate_recalls,
    tabulate_runs,
)
from har.comparison_report import compare, picture_uri, write_comparison
from har.metrics import correct_for_many
from har.recipe import VARIANTS

HOSTILE = "_<script>alert(1)</script>$^$"
PATHS = [f"train/Image_{number}.jpg" for number in range(40)]


def record(run_id: str, right: int = 20, **fields: Any) -> Record:
    """A run that is right on the first `right` of 40 images of two classes."""
    labels = ["eating", HOSTILE] * 20
    said = [
        label if number < right else "eating" if label == HOSTILE else HOSTILE
        for number, label in enumerate(labels)
    ]
    accuracy = right / len(labels)
    training = replace(
        HERE,
        run_id=run_id,
        accuracy=accuracy,
        accuracy_low=accuracy - 0.1,
        accuracy_high=accuracy + 0.1,
        **fields,
    )
    epoch = {"train_accuracy": 0.1, "val_accuracy": 0.2, "epoch_time_s": 3.0}
    return Record(
        training=training,
        recipe=asdict(VARIANTS["v3"]),
        history=[epoch, {**epoch, "epoch_time_s": 5.0}],
        predictions=pd.DataFrame({"path": PATHS, "label": labels, "predicted": said}),
        root=None,
    )


PUBLISHED = replace(
    record("published"),
    training=replace(HERE, run_id="published", published=True, accuracy=None, digests=("", "", "")),
    history=[],
    predictions=None,
    recipe=asdict(VARIANTS["v4"]),
)


def test_runs_are_ranked_only_among_those_of_the_same_test_images() -> None:
    other = record("other", 39, digests=("r", "d", "elsewhere"), started=9)
    groups, unjudged = group_by_test([record("a", 10), PUBLISHED, other, record("b", 30)])
    assert [group.test_digest for group in groups] == ["elsewhere", "t"]
    ranked = [each.training.run_id for each in groups[1].ranked]
    assert ranked == ["b", "a"] and unjudged == [PUBLISHED]
    assert len(tabulate_pairs(groups[0])) == 0 and len(tabulate_pairs(groups[1])) == 1


def test_a_row_of_the_table() -> None:
    row = run_row(record("a"))
    assert row["epoch_time_s"] == 4.0 and row["epochs"] == 2 and row["notebook_minutes"] == 22
    published = tabulate_runs([PUBLISHED]).iloc[0]
    assert published["source"] == "published" and pd.isna(published["accuracy"])
    assert pd.isna(published["epochs"])


def test_only_fields_that_differ() -> None:
    assert tabulate_differences([record("a"), record("b")]).empty
    table = tabulate_differences([record("a"), PUBLISHED])
    assert table.index.tolist() == ["precision"]
    assert table.loc["precision"].tolist() == ["float32", "mixed_float16"]
    unknown = replace(record("a"), recipe={})
    assert set(tabulate_differences([unknown, PUBLISHED])["a"]) == {"-"}


def test_pairs_are_compared_on_the_images_that_both_saw() -> None:
    better, worse = record("better", 30), record("worse", 20)
    assert better.predictions is not None
    # rows in another order, and one image less
    shuffled = replace(better, predictions=better.predictions.iloc[::-1].head(39))
    (group,), _ = group_by_test([worse, shuffled])
    (pair,) = tabulate_pairs(group).to_dict("records")
    assert (pair["first"], pair["second"], pair["images"]) == ("better", "worse", 39)
    names = (better.training.name, worse.training.name)
    assert (pair["first_name"], pair["second_name"]) == names
    assert (pair["only_first"], pair["only_second"]) == (10, 0)
    assert pair["difference"] == pytest.approx(10 / 39) and pair["low"] < 10 / 39 < pair["high"]
    assert pair["p_value"] == pytest.approx(2 * 0.5**10) == pair["p_corrected"]


def test_holm_by_hand() -> None:
    # 4 tests: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.04 x 1, never falling
    found = correct_for_many(np.array([0.04, 0.01, 0.03, 0.02]))
    np.testing.assert_allclose(found, [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(correct_for_many(np.array([0.9, 0.8])), [1.0, 1.0])
    assert len(correct_for_many(np.array([]))) == 0


def test_the_front_is_what_nothing_beats() -> None:
    records = [
        record("quick", 10, seconds=10.0),
        record("beaten", 9, seconds=20.0),
        record("good", 30, seconds=100.0),
        record("slower", 30, seconds=200.0),
        record("warm", 40, seconds=1.0, warm=True),
        record("untimed", 40, seconds=None),
    ]
    (group,), _ = group_by_test(records)
    assert [each.training.run_id for each in find_pareto_front(group)] == ["quick", "good"]


def test_recalls_and_disagreements() -> None:
    (group,), _ = group_by_test([record("a", 40), record("b", 21)])
    recalls = tabulate_recalls(group).set_index(["run_id", "label"])
    assert recalls.loc[("a", "eating"), "recall"] == 1.0
    assert recalls.loc[("a", "eating"), "name"] == group.ranked[0].training.name
    assert recalls.loc[("b", "eating"), "recall"] == 11 / 20
    table = find_disagreements(*group.ranked, count=5)
    assert len(table) == 5 and (table["first"] == table["label"]).all()
    assert table["path"].tolist() == PATHS[21:26]


def test_hostile_names_are_shown_as_they_stand() -> None:
    page = compare([record("a", 30, name=HOSTILE, changed=HOSTILE), record("b"), PUBLISHED]).page
    assert "<script" not in page and "&lt;script&gt;" in page


def test_pictures_come_from_the_data_alone(raw: Path) -> None:
    inside = picture_uri(str(raw), Path("train/Image_1.jpg"))
    assert inside.startswith("data:image/jpeg;base64,")
    root = str(raw / "elsewhere")
    for path in ("../train/Image_1.jpg", str(raw / "train/Image_1.jpg"), "train/Image_1.jpg"):
        assert picture_uri(root, Path(path)) == ""
    assert picture_uri(None, Path("train/Image_1.jpg")) == ""


def test_every_id_interval_and_p_value_is_text(tmp_path: Path) -> None:
    records = [record(f"run{number}", 10 + number) for number in range(3)]
    comparison = compare([*records, PUBLISHED])
    page = comparison.page
    for each in (*records, PUBLISHED):
        assert each.training.run_id in page
    for pair in comparison.tables["pairs"].to_dict("records"):
        assert f"{pair['p_value']:.3g}" in page and f"{100 * pair['low']:+.1f}" in page
    assert '<td class="number">40</td>' in page  # images of a pair
    assert "chooses on test" in page and "://" not in page
    write_comparison(comparison, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.html", "runs.csv", "pairs.csv", "learning_curves.png"} <= written


def test_two_hundred_runs() -> None:
    comparison = compare([record(f"run{number:03}", number % 41) for number in range(200)])
    assert len(comparison.tables["pairs"]) == 200 * 199 // 2
    assert all(f"run{number:03}" in comparison.page for number in range(200))


def test_runs_of_which_nothing_is_known() -> None:
    bare = replace(record("bare"), recipe={}, history=[], predictions=None)
    unjudged = replace(PUBLISHED, training=replace(PUBLISHED.training, seconds=None))
    for records in ([bare, unjudged], [unjudged, unjudged], [bare, record("full")]):
        assert "Comparison of 2 runs" in compare(records).page


@pytest.fixture
def trained(manifest: Any, store: str, tiny_backbone: None) -> list[str]:
    from conftest import tiny_recipe

    from har.trials import build_trial, run_trial

    recipes = (tiny_recipe(), tiny_recipe(seed=1))
    trials = [build_trial("v3", each, ("backbone",), manifest) for each in recipes]
    return [run_trial(each, "compared", started=0.0).run_id for each in trials]


def test_the_command(trained: list[str], cli, tmp_path: Path) -> None:
    import mlflow

    out = tmp_path / "out"
    cli("import-notebooks", "--experiment", "compared")
    result = cli("compare", "--experiment", "compared", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{out}/report.html" in result.output
    page = (out / "report.html").read_text()
    assert all(run_id in page for run_id in trained)
    runs = pd.read_csv(out / "runs.csv")
    assert len(runs) >= 7 and set(runs["notebook_minutes"]) == {36, 28, 22, 21}
    (run,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.job = 'compare'", output_format="list"
    )
    logged = {each.path for each in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.html", "runs.csv", "figures"} <= logged and run.info.status == "FINISHED"
    named = cli("compare", trained[0], "--runs", trained[1], "--out", tmp_path / "two")
    assert named.exit_code == 0 and len(pd.read_csv(tmp_path / "two/runs.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0" * 32, "1" * 32], "cannot be read"),
        (["--experiment", "nowhere"], "no such experiment: nowhere"),
        (["--experiment", "Default"], "two finished trainings"),
    ],
)
def test_what_cannot_be_compared(arguments: list[str], said: str, store: str, cli) -> None:
    result = cli("compare", *arguments)
    assert result.exit_code == 2 and said in result.output
    assert not Path("comparison").exists()
