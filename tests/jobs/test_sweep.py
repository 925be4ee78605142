"""A whole search: its trials never see a test image, and its winner is trained like any other."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pandas as pd
import pytest

from har.jobs import sweep, trials
from har.jobs.children import KilledFromOutside
from har.jobs.trials import find_score
from har.recipe import VARIANTS
from har.tracking.artifacts import read_artifact
from har.training.feature_cache import list_entries
from tests.fixtures import tiny_recipe, tracking_to
from tests.jobs.conftest import in_a_thread

TINY = (
    "--backbone", "efficientnet-lite0", "--image-size", "32", "--batch-size", "4",
    "--precision", "float32", "--strategy", "one_device", "--runtime", "tensorflow",
    "--test-fraction", "0.25",
)  # fmt: skip
FIELDS = ("--param", "learning_rate=log:1e-4:1e-1", "--param", "head=gap_dropout,linear_probe")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweep, trials):
        monkeypatch.setattr(module, "in_own_process", in_a_thread)


def find(experiment: str, job: str) -> list[mlflow.entities.Run]:
    ids = [mlflow.get_experiment_by_name(experiment).experiment_id]
    return mlflow.search_runs(ids, f"tags.job = '{job}'", output_format="list")


def arguments(experiment: str, data: Path, *more: object) -> tuple[object, ...]:
    return (
        "sweep", "--variant", "v5", "--epochs", "3", *TINY, "--data", data,
        "--experiment", experiment, *more,
    )  # fmt: skip


@pytest.fixture
def hidden_test_images(tiny_raw: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """While trials run, the test images are not there at all."""
    hidden: list[str] = []

    def run(asked: Any, *rest: Any) -> Any:
        paths = [asked.manifest.root / each for each in asked.manifest.rows("test")["path"]]
        for path in paths:
            path.rename(path.with_suffix(".hidden"))
        try:
            return trials.run_missing_trials(asked, *rest)
        finally:
            for path in paths:
                path.with_suffix(".hidden").rename(path)
            if not hidden:
                # before the winner is evaluated
                assert all(entry.shape[0] != len(paths) for entry in list_entries())
            hidden.extend(map(str, paths))

    monkeypatch.setattr(sweep, "run_missing_trials", run)
    return hidden


def test_a_search_and_again(
    in_this_process: None,
    hidden_test_images: list[str],
    tiny_backbone: None,
    tiny_raw: Path,
    store: str,
    cli: Any,
) -> None:
    result = cli(*arguments("swept", tiny_raw, *FIELDS, "--trials", 4))
    assert result.exit_code == 0, result.output
    assert len(hidden_test_images) > 5
    (parent,), tried, (winner,) = (find("swept", job) for job in ("sweep", "trial", "train"))
    assert len(tried) == 4 and parent.info.status == "FINISHED"
    for run in (*tried, winner):
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for run in tried:
        assert run.info.status == "FINISHED" and "val_accuracy" in run.data.metrics
        # the plain names are those of the test split
        assert not {"accuracy", "log_loss", "top_3_accuracy"} & set(run.data.metrics)
    assert "accuracy" in winner.data.metrics

    # the best by validation is what was trained, and the printed command trains it again
    table = pd.read_csv(
        mlflow.artifacts.download_artifacts(f"runs:/{parent.info.run_id}/trials.csv")
    )
    assert table["val_accuracy"].max() == table["val_accuracy"][0]
    scores = {run.info.run_id: run.data.metrics["val_accuracy"] for run in tried}
    assert set(table["run_id"]) == set(scores)
    best = mlflow.get_run(table["run_id"][0])
    assert best.data.tags["recipe_digest"] == winner.data.tags["recipe_digest"]
    assert best.data.metrics["val_loss"] == winner.data.metrics["val_loss"]
    assert len(table[table["head"] == "linear_probe"]) == 1
    assert table[table["head"] == "linear_probe"]["learning_rate"].isna().all()
    command = next(line for line in result.output.splitlines() if line.startswith("har run"))
    again = cli(*command.split()[1:], *TINY[6:10], "--run-name", "by the command")
    assert again.exit_code == 0, again.output
    (repeated,) = [r for r in find("swept", "train") if r.info.run_name == "by the command"]
    assert repeated.data.metrics["accuracy"] == winner.data.metrics["accuracy"]
    for name in ("importances", "parallel_coordinates"):
        picture = read_artifact(parent.info.run_id, f"figures/{name}.png", 10_000_000)
        assert picture.startswith(b"\x89PNG")
    assert command in parent.data.tags["mlflow.note.content"]

    # all there: nothing is trained; more trials go on in the same run
    same = cli(*arguments("swept", tiny_raw, *FIELDS, "--trials", 4))
    assert same.exit_code == 0 and "trial 4 of 4" not in same.output
    assert len(find("swept", "trial")) == 4 and len(find("swept", "train")) == 2
    more = cli(*arguments("swept", tiny_raw, *FIELDS, "--trials", 5))
    assert more.exit_code == 0 and "trial 5 of 5" in more.output, more.output
    assert len(find("swept", "trial")) == 5 and len(find("swept", "sweep")) == 1


def test_trials_that_fail_are_recorded_and_the_search_goes_on(
    in_this_process: None, tiny_backbone: None, tiny_raw: Path, store: str, cli: Any
) -> None:
    """Sparse labels cannot be smoothed, and a rate of 10 diverges."""
    fields = ("--param", "label_smoothing=0,0.1", "--param", "learning_rate=0.001,10")
    result = cli(*arguments("failing", tiny_raw, *fields, "--trials", 4))
    assert result.exit_code == 0, result.output
    failed = [run for run in find("failing", "trial") if run.info.status == "FAILED"]
    assert len(failed) >= 2
    assert all(run.data.tags["trial_state"] == "failed" for run in failed)
    assert any("label_smoothing" in run.data.tags["error"] for run in failed)
    assert "failed: label_smoothing=0.1 needs" in result.output
    (winner,) = find("failing", "train")
    assert winner.data.params["recipe.label_smoothing"] == "0.0"
    none = ("--param", "label_smoothing=0.1,0.2")
    result = cli(*arguments("failing", tiny_raw, *none, "--trials", 2))
    assert result.exit_code == 2
    assert "none of 2 trials succeeded: label_smoothing" in result.output


@pytest.mark.slow
def test_others_than_on_features_each_have_a_process(
    in_this_process: None, tiny_backbone: None, tiny_raw: Path, store: str, cli: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One of them is killed, and that is a failed trial; an equal training is not repeated."""
    alone = ("--variant", "v3", "--epochs", "2", *TINY, "--data", tiny_raw, "--experiment", "apart")
    assert cli("run", *alone).exit_code == 0
    started: list[Any] = []

    def start(function: Any, *arguments: Any) -> Any:
        started.append(function)
        if started.count(trials._evaluate_trial) == 2 and function is trials._evaluate_trial:
            raise KilledFromOutside("killed")
        return in_a_thread(function, *arguments)

    monkeypatch.setattr(trials, "in_own_process", start)
    fields = ("--param", "learning_rate=log:1e-4:1e-2", "--pruning", "none")
    result = cli("sweep", *alone, *fields, "--trials", 4)
    assert result.exit_code == 0, result.output
    assert started == [trials._evaluate_trial] * 4
    # the variant's own values had been trained before: no trial of its own
    assert len(find("apart", "trial")) == 2
    assert "1 failed" in result.output and "failed: killed" in result.output


@pytest.mark.slow
def test_a_trial_far_below_the_others_is_pruned(
    in_this_process: None, tiny_backbone: None, tiny_raw: Path, store: str, cli: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number == 1)
    fields = ("--param", "learning_rate=log:1e-4:1e-2")
    result = cli(*arguments("pruned", tiny_raw, *fields, "--trials", 3))
    assert result.exit_code == 0 and "1 pruned" in result.output, result.output
    (pruned,) = [r for r in find("pruned", "trial") if r.data.tags["trial_state"] == "pruned"]
    client = mlflow.MlflowClient()
    assert len(client.get_metric_history(pruned.info.run_id, "val_accuracy")) == 1
    kept = cli(*arguments("pruned", tiny_raw, *fields, "--trials", 3, "--pruning", "none"))
    assert kept.exit_code == 0 and "0 pruned" in kept.output


@pytest.mark.slow
def test_another_store_has_a_search_of_its_own(
    in_this_process: None, tiny_backbone: None, tiny_raw: Path, tmp_path: Path, cli: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With Optuna's file of the first, whose trials have no runs there."""
    fields = ("--param", "learning_rate=log:1e-4:1e-2", "--trials", 1)
    for name in ("one", "other"):
        uri = f"sqlite:///{tmp_path}/{name}.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with tracking_to(uri):
            assert cli(*arguments("har", tiny_raw, *fields)).exit_code == 0
            assert len(find("har", "trial")) == 1 == len(find("har", "train"))


def test_the_score_is_that_of_the_weights_that_are_kept() -> None:
    history = [
        {"val_accuracy": accuracy, "val_loss": loss}
        for accuracy, loss in ((0.1, 3.0), (0.5, 2.0), (0.4, 1.0))
    ]
    assert find_score(VARIANTS["v5"], history, "val_loss") == 2.0
    last = tiny_recipe("v5", checkpoint="last", patience=0)
    assert find_score(last, history, "val_loss") == 1.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "Missing option '--param'"),
        (("--param", "lr=1:2"), "FIELD=VALUES"),
        (("--param", "epochs=1,2"), "--param searches epochs: leave the option out"),
        (("--param", "dropout=0,1"), "The fields are"),
        (("--param", "batch_size=2,4", "--trials", "0"), "--trials"),
        (("--param", "batch_size=2,4", "--metric", "accuracy"), "val_accuracy"),
        (("--param", "optimizer=adam,adamw", "--storage", "nothing"), "--storage nothing"),
        (
            (
                "--param", "optimizer=adam,adamw", "--validation-fraction", "0", "--patience", "0",
                "--checkpoint", "last",
            ),
            "--validation-fraction 0.2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_searched(
    more: tuple[str, ...], said: str, in_this_process: None, tiny_raw: Path, store: str, cli: Any
) -> None:
    before = len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    result = cli(*arguments("har", tiny_raw, *more))
    assert result.exit_code == 2 and said in result.output, result.output
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_and_killed_searches_resume(
    number: signal.Signals, tiny_raw: Path, store: str, cli: Any
) -> None:
    """Every trial that was over stays, and none is there twice."""
    experiment = f"ended by {number.name}"
    words = arguments(experiment, tiny_raw, "--param", "learning_rate=log:1e-4:1e-1", "--trials", 8)
    command = [sys.executable, "-m", "har", *map(str, words)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=number == signal.SIGKILL
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("trial 3 of 8"):
            break
    if number == signal.SIGKILL:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=True)
    else:
        process.send_signal(number)
    said += process.stderr.read()
    assert process.wait(timeout=60) == (130 if number == signal.SIGINT else -9), said
    if number == signal.SIGINT:
        assert not [r for r in find(experiment, "trial") if r.info.status == "RUNNING"]
    over = [r for r in find(experiment, "trial") if r.info.status == "FINISHED"]
    assert 3 <= len(over) < 8
    started = time.monotonic()
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "trial 3 of 8" not in done.stderr and time.monotonic() - started < 200
    everything = find(experiment, "trial")
    finished = [r for r in everything if r.info.status == "FINISHED"]
    assert len(finished) == 8 == len({r.data.params["recipe.learning_rate"] for r in finished})
    assert {r.info.run_id for r in over} <= {r.info.run_id for r in finished}
    assert {r.info.status for r in everything} <= {"FINISHED", "KILLED"}
    assert len(find(experiment, "train")) == 1 == len(find(experiment, "sweep"))


@pytest.mark.slow
def test_two_processes_share_a_search(tiny_raw: Path, store: str) -> None:
    words = arguments("shared search", tiny_raw, "--param", "learning_rate=log:1e-4:1e-1")
    command = [sys.executable, "-m", "har", *map(str, words), "--trials", "12"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    tried = find("shared search", "trial")
    assert len({r.data.params["recipe.learning_rate"] for r in tried}) == len(tried)
    # each may have started one when the other had the last but one
    assert 12 <= len(tried) <= 13 and {r.info.status for r in tried} == {"FINISHED"}
    assert all("trial " in text for text in said)
    assert len(find("shared search", "train")) == 1 == len(find("shared search", "sweep"))
