"""Which run is the candidate, and whether it is better: by hand."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from har.serving.selection import (
    Champion,
    Decision,
    Rules,
    Selected,
    check_chance,
    decide,
    decide_without_test,
    select_candidate,
)
from har.tracking.records import Record
from har.util.errors import UserError
from tests.compare.conftest import HERE

FIRST = replace(
    HERE,
    run_id="a",
    name="v3 · lite0 · 1xCPU",
    hardware="1xCPU",
    digests=("r", "d", "d1"),
    test_metrics={"accuracy": 0.5},
)


CHAMPION = Champion(version="3", run_id="c", test_digest="d1", uris=("models:/har/3",))


def candidate(run_id: str, accuracy: float = 0.5, test_digest: str = "d1", **fields: Any) -> Record:
    digests, metrics = ("r", "d", test_digest), {"accuracy": accuracy}
    return replace(FIRST, run_id=run_id, digests=digests, test_metrics=metrics, **fields)


def chosen(candidates: list[Record], champions: str | None = None, **rules: Any) -> Selected:
    return select_candidate(candidates, Rules(**rules), champions)


def test_validation_accuracy_selects_where_a_run_has_one() -> None:
    best = candidate("b", val_accuracy=0.8, accuracy=0.6, started=2)
    runs = [
        candidate("tested only", 0.9),
        candidate("younger", val_accuracy=0.8, accuracy=0.9, started=3),
        best,
        candidate("worse", val_accuracy=0.7, accuracy=0.9),
        candidate("elsewhere", val_accuracy=0.9, accuracy=0.9, test_digest="d2"),
    ]
    choice = chosen(runs, "d1")
    assert (choice.record, choice.selection) == (best, "validation")
    assert choice.notes == (
        "candidates with test digest d1: 4",
        "left out, on other test images (images): 1 trainings; to choose among them: har promote"
        " --test-digest d2 --ignore-champion",
        "not considered, without validation accuracy: tested only",
        "candidate: v3 · lite0 · 1xCPU, run b, selected on validation (validation accuracy 80.0%)",
    )
    assert chosen(runs, "d1", select_by="test").record.run_id == "tested only"


def test_test_accuracy_selects_where_no_run_has_another_and_says_so() -> None:
    runs = [FIRST, candidate("b", accuracy=0.7, started=9), candidate("c", accuracy=0.7, started=8)]
    choice = chosen(runs)
    assert (choice.record.run_id, choice.selection) == ("c", "test")
    assert "selected on test (accuracy 70.0%" in choice.notes[-1]
    with pytest.raises(UserError, match=r"none of the 3 .* d1 has a validation accuracy"):
        chosen(runs, select_by="validation")


def test_digest_is_the_one_asked_for_else_the_champions_else_the_newest() -> None:
    runs = [FIRST, candidate("b", test_digest="d2", started=2), candidate("c", test_digest="d3")]
    assert chosen(runs, "d1", test_digest="d3").record.test_digest == "d3"
    assert chosen(runs, "d1").record.test_digest == "d1"
    assert chosen(runs, "gone").record.test_digest == "d2"
    with pytest.raises(UserError, match=r"test digest d9; there are: d1 \(1\), d2 \(1\), d3 \(1\)"):
        chosen(runs, test_digest="d9")


def predictions(hits: str) -> pd.DataFrame:
    """Image by image, 1 for a right and 0 for a wrong prediction."""
    labels = ["NA", *(f"c{i}" for i in range(1, len(hits)))]
    rows = [
        (f"{i}.jpg", label, label if hit == "1" else "no")
        for i, (hit, label) in enumerate(zip(hits, labels, strict=True))
    ]
    return pd.DataFrame(rows, columns=["path", "label", "predicted"])


def decided(hits: str, before: str, alpha: float = 0.05) -> Decision:
    # rows in any order
    champions = predictions(before)[::-1]
    return decide(chosen([FIRST]), CHAMPION, predictions(hits), champions, alpha)


def test_predictions_are_joined_by_path() -> None:
    # only the candidate on 3, only the champion on 1: 2 (C(4,0) + C(4,1)) / 2^4
    found = decided("1111100", "0001110")
    assert "only the candidate on 3, only the champion on 1" in found.why
    assert found.p_value == pytest.approx(0.625)


def test_other_labels_are_not_compared() -> None:
    other = predictions("111")
    other.loc[1:, "label"] = "other"
    with pytest.raises(UserError, match=r"1\.jpg and 1 more images have another label"):
        decide(chosen([FIRST]), CHAMPION, predictions("111"), other, 0.05)


@pytest.mark.parametrize(
    ("only_candidate", "only_champion", "level", "outcome"),
    [
        (6, 0, 0.05, "would promote"),  # p = 2/64
        (6, 0, 0.03, "kept"),
        (5, 0, 0.05, "kept"),  # p = 2/32
        (5, 0, 0.1, "would promote"),
        (0, 6, 0.05, "kept"),
        (0, 0, 1.0, "kept"),
        (2, 2, 1.0, "kept"),
    ],
)
def test_only_significantly_better_is_promoted(
    only_candidate: int, only_champion: int, level: float, outcome: str
) -> None:
    after = "110" + "1" * only_candidate + "0" * only_champion
    before = "110" + "0" * only_candidate + "1" * only_champion
    assert decided(after, before, level).outcome == outcome


def test_why_has_all_the_numbers() -> None:
    found = decided("1111110", "1000001")
    assert found.why == (
        "the candidate is right on 6 of 7 test images (85.7%), the champion, version 3, on 2"
        " (28.6%); only the candidate on 5, only the champion on 1: p = 0.219 (McNemar, exact) is"
        " not below 0.05"
    )
    assert decided("1111111", "1000000").why.endswith("p = 0.0312 (McNemar, exact) is below 0.05")
    assert decided("10", "11").why.endswith("only the champion on 1: it is not better")


def test_the_first_is_promoted_and_the_champion_not_again() -> None:
    first = decide_without_test(chosen([FIRST]), None)
    assert (first.outcome, first.why) == ("would promote", "it is the first champion")
    again = decide_without_test(chosen([candidate("c")]), CHAMPION)
    assert again.outcome == "kept"
    assert again.why == "the candidate is the present champion, version 3"


@pytest.mark.parametrize(
    ("accuracy", "validation", "message"),
    [
        (0.03, 0.5, "its test accuracy is 3.0%, below the 6.7% of guessing among 15 classes"),
        (0.5, 0.03, "its validation accuracy is 3.0%, below the 6.7%"),
        (0.03, None, "its test accuracy is 3.0%"),
    ],
)
def test_below_guessing_is_never_promoted(
    accuracy: float, validation: float | None, message: str
) -> None:
    choice = chosen([candidate("a", accuracy, val_accuracy=validation)])
    with pytest.raises(UserError, match=message):
        check_chance(choice, 15)


def test_at_guessing_is_warned_about() -> None:
    choice = chosen([candidate("a", 0.1)])
    assert check_chance(choice, 15) == choice
    choice.record.test_metrics["accuracy_low"] = 0.06
    assert "may be no better than guessing" in check_chance(choice, 15).notes[-1]
    choice.record.test_metrics["accuracy_low"] = 0.08
    assert check_chance(choice, 15) == choice
