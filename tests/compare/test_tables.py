"""Tables of a comparison, by hand."""

from dataclasses import replace

import pandas as pd
import pytest

from har.compare.tables import (
    find_disagreements,
    find_pareto_front,
    group_by_test,
    run_row,
    tabulate_differences,
    tabulate_pairs,
    tabulate_recalls,
    tabulate_runs,
)
from tests.compare.conftest import PATHS, PUBLISHED, record


def test_runs_are_ranked_only_among_those_of_the_same_test_images() -> None:
    other = record("other", 39, digests=("r", "d", "elsewhere"), started=9)
    groups, unevaluated = group_by_test([record("a", 10), PUBLISHED, other, record("b", 30)])
    assert [group.test_digest for group in groups] == ["elsewhere", "t"]
    ranked = [each.run_id for each in groups[1].ranked]
    assert ranked == ["b", "a"] and unevaluated == [PUBLISHED]
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
    names = (better.name, worse.name)
    assert (pair["first_name"], pair["second_name"]) == names
    assert (pair["only_first"], pair["only_second"]) == (10, 0)
    assert pair["difference"] == pytest.approx(10 / 39) and pair["low"] < 10 / 39 < pair["high"]
    assert pair["p_value"] == pytest.approx(2 * 0.5**10) == pair["p_corrected"]


def test_the_front_is_what_nothing_beats() -> None:
    records = [
        record("quick", 10, seconds=10.0),
        record("beaten", 9, seconds=20.0),
        record("good", 30, seconds=100.0),
        record("slower", 30, seconds=200.0),
        record("warm", 40, seconds=1.0, cache_hit=True),
        record("untimed", 40, seconds=None),
    ]
    (group,), _ = group_by_test(records)
    assert [each.run_id for each in find_pareto_front(group)] == ["quick", "good"]


def test_recalls_and_disagreements() -> None:
    (group,), _ = group_by_test([record("a", 40), record("b", 21)])
    recalls = tabulate_recalls(group).set_index(["run_id", "label"])
    assert recalls.loc[("a", "eating"), "recall"] == 1.0
    assert recalls.loc[("a", "eating"), "name"] == group.ranked[0].name
    assert recalls.loc[("b", "eating"), "recall"] == 11 / 20
    table = find_disagreements(*group.ranked, count=5)
    assert len(table) == 5 and (table["first"] == table["label"]).all()
    assert table["path"].tolist() == PATHS[21:26]
