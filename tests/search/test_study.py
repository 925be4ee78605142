"""Searches in Optuna's storage: resumed, shared, and never doing a thing twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import pytest

from har.search import study
from har.search.space import parse_space
from har.search.study import ERROR, Search, TrialFailed, is_interrupted
from har.util.errors import UserError

SPACE = parse_space(["learning_rate=log:1e-4:1e-2", "batch_size=16,32,64"])
Evaluate = Callable[[Any, dict[str, Any]], float]


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/optuna.db"


def open_search(
    storage: str, name: str = "a", metric: Any = "val_accuracy", **options: Any
) -> Search:
    space = options.pop("space", SPACE)
    return Search(
        storage, name, space, metric, seed=options.pop("seed", 0), spared=1, process=uuid4().hex
    )


def score(trial: Any, values: dict[str, Any]) -> float:
    return 1 - abs(values["learning_rate"] - 2e-3) - abs(values["batch_size"] - 32) / 1000


def tried(search: Search) -> list[dict[str, Any]]:
    return [each.params for each in sorted(search.ended, key=lambda each: each.number)]


def test_a_resumed_search_tries_what_an_uninterrupted_one_does(storage: str) -> None:
    whole = open_search(storage, "whole")
    for _ in range(12):
        whole.run_trial(score, {})
    interrupted: list[dict[str, Any]] = []

    def stop(trial: Any, values: dict[str, Any]) -> float:
        interrupted.append(values)
        raise KeyboardInterrupt

    for number in range(12):
        # each in what might be a new process
        if number in (0, 7):
            with pytest.raises(KeyboardInterrupt):
                open_search(storage, "stopped").run_trial(stop, {})
        open_search(storage, "stopped").run_trial(score, {})
    stopped = open_search(storage, "stopped")
    assert tried(stopped) == tried(whole)
    assert interrupted == [tried(whole)[0], tried(whole)[7]]
    assert stopped.progress.done == 12
    assert stopped.progress.best is not None and whole.progress.best is not None
    assert stopped.progress.best.params == whole.progress.best.params


def test_another_seed_tries_other_values(storage: str) -> None:
    one, other = open_search(storage, "one"), open_search(storage, "other", seed=100)
    for search in (one, other):
        search.run_trial(score, {})
    assert tried(one) != tried(other)


def test_the_first_trial_has_the_values_to_start_from(storage: str) -> None:
    search, start = open_search(storage), {"learning_rate": 1e-3, "batch_size": 64}
    for _ in range(3):
        search.run_trial(score, start)
    assert tried(search)[0] == start and start not in tried(search)[1:]


def test_losses_are_minimised_and_failures_and_the_pruned_come_last(storage: str) -> None:
    search = open_search(storage, metric="val_loss")
    outcomes: list[Any] = [0.5, TrialFailed("no"), optuna.TrialPruned(), 0.2, 0.9]

    def evaluate(trial: Any, values: dict[str, Any]) -> float:
        outcome = outcomes[trial.number]
        if isinstance(outcome, TrialFailed):
            trial.set_user_attr(ERROR, "no")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    for _ in outcomes:
        search.run_trial(evaluate, {})
    assert [each.value for each in search.ended][:3] == [0.2, 0.5, 0.9]
    assert [each.state.name for each in search.ended][3:] == ["PRUNED", "FAIL"]
    progress = search.progress
    assert (progress.done, progress.complete, progress.pruned, progress.failed) == (5, 3, 1, 1)
    assert progress.best is not None and progress.best.value == 0.2


def test_equal_recipes_are_trained_once(storage: str) -> None:
    """Batch sizes alone: three recipes, then nothing is left."""
    search = open_search(storage, space=parse_space(["batch_size=16,32,64"]))
    trained: list[int] = []

    def evaluate(trial: Any, values: dict[str, Any]) -> float:
        if not search.claim(trial, str(values["batch_size"])):
            raise TrialFailed("repeated")
        trained.append(values["batch_size"])
        return 0.5

    while not search.is_exhausted:
        search.run_trial(evaluate, {})
    assert sorted(trained) == [16, 32, 64]
    assert search.progress.done == 3 and search.progress.failed == 0


def test_a_recipe_that_another_process_trains_now_is_left_to_it(storage: str) -> None:
    one, other = open_search(storage), open_search(storage)
    answers = []

    def evaluate(trial: Any, values: dict[str, Any]) -> float:
        assert one.claim(trial, "same")
        answers.append(other.claim(other.study.ask(), "same"))
        assert other.progress.running == 2
        return 0.5

    one.run_trial(evaluate, {})
    assert answers == [False]


def test_the_process_that_ends_the_last_trial_evaluates_the_winner(storage: str) -> None:
    one, other, later = (open_search(storage) for _ in range(3))
    one.run_trial(score, {})
    assert one.is_last()
    other.run_trial(score, {})
    assert other.is_last() and not one.is_last()
    # a later command that finds all trials done
    assert later.is_last()


def test_a_killed_process_is_noticed(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HEARTBEAT_S", 1)
    monkeypatch.setattr(study, "GRACE_S", 1)
    killed = open_search(storage)
    killed.study._storage.record_heartbeat(killed.study.ask()._trial_id)
    here = open_search(storage)
    assert here.progress.running == 1
    progress = here.wait_for_others()
    assert (progress.running, progress.done) == (0, 0)


def test_a_trial_that_others_took_for_dead_is_tried_again(storage: str) -> None:
    """As of a computer that slept: its process goes on."""
    search, other = open_search(storage), open_search(storage)

    def sleep(trial: Any, values: dict[str, Any]) -> float:
        other.study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
        return 0.5

    lost = search.run_trial(sleep, {})
    assert is_interrupted(lost) and search.progress.done == 0
    assert search.run_trial(score, {}).params == lost.params
    assert search.progress.done == 1


def test_a_bug_in_a_trial_is_not_taken_for_a_lost_one(storage: str) -> None:
    def fail(trial: Any, values: dict[str, Any]) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_search(storage).run_trial(fail, {})


@pytest.mark.parametrize(
    "url",
    [
        "nothing",
        "sqlite:////nowhere/at/all.db",
        "mysql://user:secret@localhost/x",
        "sqlite:///{}/text",
    ],
)
def test_a_storage_that_cannot_be_used(url: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    with pytest.raises(UserError) as raised:
        open_search(url.format(tmp_path))
    assert "--storage" in str(raised.value) and "secret" not in str(raised.value)
    assert len(raised.value.args) == 1


def test_optuna_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    study.check_optuna()
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'optuna"):
        study.check_optuna()
