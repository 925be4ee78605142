"""What the page says first."""

from dataclasses import replace

from har.compare.answers import find_answers
from har.compare.tables import find_pareto_front, group_by_test
from har.tracking.records import Record
from tests.compare.conftest import record


def answers(records: list[Record], looks: int = 0) -> dict[str, tuple[str, ...]]:
    (group,), _ = group_by_test(records)
    found = find_answers(group, find_pareto_front(group), looks)
    return {each.question: each.sentences for each in found}


def test_the_best_is_chosen_by_validation_and_the_fastest_by_whole_jobs() -> None:
    slow = record("slow", 30, name="slow", seconds=400.0, val_accuracy=0.8)
    quick = record("quick", 35, name="quick", seconds=50.0, val_accuracy=0.7)
    cached = record("cached", 10, name="cached", seconds=1.0, val_accuracy=0.1, cache_hit=True)
    found = answers([slow, quick, cached], looks=7)
    (best,) = found["Most accurate on validation images"]
    assert best.startswith(
        "slow (slow): 75.0% (65.0% to 85.0%) of test images right, after 6 min 40"
    )
    assert "On validation images it has 80.0%." in best
    (fastest,) = found["Fastest"]
    assert fastest.startswith("quick (quick): 87.5%") and "after 50 s." in fastest
    # quick is better in both
    assert "Beaten by none in both accuracy and time" not in found
    assert found["How often these test images were used"] == ("7 evaluations in this experiment.",)


def test_what_no_run_beats_is_named_with_intervals() -> None:
    found = answers([record("a", 20, seconds=10.0), record("b", 30, seconds=90.0)])
    first, second = found["Beaten by none in both accuracy and time"]
    assert "(a): 50.0%" in first and "(b): 75.0%" in second and "to" in first


def test_without_validation_it_says_so() -> None:
    (group,), _ = group_by_test([record("a", 20), record("b", 30)])
    best = find_answers(group, [], 0)[0]
    assert best.question == "Most accurate on test images" and "(b)" in best.sentences[0]
    assert "No run has a validation accuracy" in best.note


def test_unknown_times_and_intervals_are_left_out() -> None:
    bare = replace(record("a"), seconds=None, test_metrics={"accuracy": 0.5})
    (sentence,) = answers([bare])["Most accurate on test images"]
    assert sentence.endswith("(a): 50.0% of test images right.")
