"""Which model becomes champion, through a real store."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from har.inference.classifier import CLASSIFIER_FOLDER, save_classifier
from har.models.build import build_model
from har.serving import promotion
from har.serving.package import log_classifier
from har.serving.selection import Decision
from har.tracking.query import delete_models
from tests.fixtures import CLASSES, PATH, new_store, tiny_backbones, tiny_recipe, tracking_to
from tests.serving.test_selection import predictions

ROOT = Path(__file__).parents[2]


TOP = [{"label": "running", "probability": 0.75}, {"label": "sitting", "probability": 0.25}]


PICTURE = {"label": "running", "probability": 0.75, "top_3": TOP, "error": None}


JUNK = {"label": None, "probability": None, "top_3": [], "error": "not an image"}


@pytest.mark.parametrize(
    ("picture", "junk", "problem"),
    [
        ({}, {}, None),
        ({"error": "too large"}, {}, "a picture gets the error too large"),
        ({"label": "flying"}, {}, "'flying' is none of its classes"),
        ({"label": None}, {}, "None is none of its classes"),
        ({"probability": float("nan")}, {}, "a probability is nan"),
        ({"probability": 1.5}, {}, "a probability is 1.5"),
        ({"top_3": [{"label": "x", "probability": 0.5}]}, {}, "'x' is none of its classes"),
        ({}, {"error": None}, "what is no image gets no error"),
        ({}, {"label": "running"}, "what is no image gets no error"),
    ],
)
def test_answers_that_no_server_may_give(picture: dict, junk: dict, problem: str | None) -> None:
    assert promotion.check_answers([PICTURE | picture, JUNK | junk], CLASSES) == problem


def save_tiny(parent: Path, broken: bool) -> Path:
    """An untrained classifier; one that is broken has diverged, so that it gives no numbers."""
    folder, recipe = parent / CLASSIFIER_FOLDER, tiny_recipe()
    with tiny_backbones():
        model = build_model(recipe, len(CLASSES))
        if broken:
            model.layers[-1].kernel.assign(np.full(model.layers[-1].kernel.shape, np.nan))
        save_classifier(folder, model, CLASSES, recipe)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), broken=False)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("broken"), broken=True)


@dataclass
class Lab:
    """A store of its own, and a quick way to a run in it."""

    uri: str
    folder: Path
    broken: Path
    experiment_id: str

    @contextmanager
    def log(self, job: str, hits: str, digest: str, **tags: str) -> Iterator[str]:
        tags = {
            "variant": "v3",
            "differs_from_variant": "none",
            "hardware": "1xCPU",
            "test_digest": digest,
            "job": job,
            **tags,
        }
        with mlflow.start_run(
            experiment_id=self.experiment_id, run_name=f"{job} · {hits}", tags=tags
        ) as run:
            accuracy = hits.count("1") / len(hits)
            low = min(accuracy, 0.5)
            mlflow.log_metrics({"accuracy": accuracy, "accuracy_low": low, "accuracy_high": 1.0})
            mlflow.log_metrics({"latency_ms": 7.25, "latency_p95_ms": 9.0})
            mlflow.log_text(predictions(hits).to_csv(index=False), "evaluation/predictions.csv")
            yield run.info.run_id

    def train(self, hits: str, digest: str = "d1", broken: bool = False, **tags: str) -> str:
        with self.log("train", hits, digest, **tags) as run_id:
            mlflow.log_params({"split_seed": 5, "duplicates": "near"})
            log_classifier(self.broken if broken else self.folder)
        return run_id

    def evaluate(self, hits: str, digest: str, **tags: str) -> None:
        with self.log("evaluate", hits, digest, **tags):
            pass


@pytest.fixture
def lab(
    folder: Path,
    broken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Lab]:
    before = mlflow.get_tracking_uri()
    uri = new_store(tmp_path)
    mlflow.set_tracking_uri(uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    artifacts = (tmp_path / "artifacts").as_uri()
    yield Lab(uri, folder, broken, mlflow.create_experiment("har", artifact_location=artifacts))
    mlflow.set_tracking_uri(before)


def aliases() -> dict[str, str]:
    """Run ids of the versions that the aliases name."""
    client = MlflowClient()
    if not client.search_registered_models():
        return {}
    there = client.get_registered_model("har").aliases
    return {alias: client.get_model_version("har", v).run_id for alias, v in there.items()}


def versions() -> list[str]:
    return [each.run_id for each in MlflowClient().search_model_versions("name = 'har'")]


def test_the_first_champion(lab: Lab, cli) -> None:
    missing = cli("champion")
    assert missing.exit_code == 2 and "there is no champion yet" in missing.stderr
    run_id = lab.train("11110")
    lab.train("11100")
    dry = cli("promote", "--experiment", "har", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.splitlines()[-2:] == [
        "would promote: it is the first champion",
        "dry run: nothing was changed",
    ]
    assert aliases() == {} and versions() == []

    result = cli("promote", "--experiment", "har")
    assert result.exit_code == 0 and result.stderr == "", result.output
    assert result.stdout.splitlines() == [
        "candidates with test digest d1: 2",
        f"candidate: train · 11110, run {run_id}, selected on test (accuracy 80.0%, too high"
        " since selected by it)",
        "promoted: it is the first champion",
        "models:/har@champion is now version 1",
    ]
    assert aliases() == {"champion": run_id}
    assert MlflowClient().get_model_version("har", "1").tags == {
        "run_id": run_id,
        "variant": "v3",
        "hardware": "1xCPU",
        "accuracy": "0.8",
        "test_digest": "d1",
        "selection": "test",
        "p_value": "none",
    }
    answers = mlflow.pyfunc.load_model("models:/har@champion").predict(
        pd.DataFrame({"image": [b"junk"]})
    )
    assert answers[0]["error"]
    assert cli("champion").stdout.splitlines() == [
        "champion     models:/har@champion, version 1",
        f"run          {run_id}, train · 11110",
        "variant      v3",
        "hardware     1xCPU",
        "accuracy     80.0% (50.0% to 100.0%), test digest d1",
        "latency      7.2 ms an image (95th percentile 9.0 ms)",
        "selected on  test",
        "before       none",
    ]

    again = cli("promote", "--experiment", "har")
    assert again.exit_code == 0
    assert again.stdout.endswith("kept: the candidate is the present champion, version 1\n")
    assert versions() == [run_id]


def test_only_a_better_one_takes_its_place(lab: Lab, cli) -> None:
    first = lab.train("1100000000")
    assert cli("promote").exit_code == 0
    lab.train("1111111000")  # 5 to none: p = 0.0625
    kept = cli("promote")
    assert kept.exit_code == 0 and "p = 0.0625 (McNemar, exact) is not below 0.05" in kept.stdout
    assert aliases() == {"champion": first} and versions() == [first]
    best = lab.train("1111111111")
    lab.train("1111111111", digest="d2")
    result = cli("promote")
    assert result.exit_code == 0, result.output
    assert "promote --test-digest d2 --ignore-champion" in result.stdout
    assert result.stdout.splitlines()[-2:] == [
        "models:/har@champion is now version 2",
        "models:/har@previous-champion is version 1",
    ]
    assert aliases() == {"champion": best, "previous-champion": first}
    assert MlflowClient().get_model_version("har", "2").tags["p_value"] == str(2 / 2**8)
    assert cli("champion").stdout.endswith(
        "before       models:/har@previous-champion, version 1\n"
    )


def test_a_champion_of_other_images_is_evaluated_first(lab: Lab, cli) -> None:
    first = lab.train("11000000")
    assert cli("promote").exit_code == 0
    best = lab.train("11111111", digest="d2")
    refused = cli("promote", "--test-digest", "d2")
    assert refused.exit_code == 2 and len(refused.stderr.splitlines()) == 1
    assert (
        "`har evaluate --model models:/har/1 --data DIR --test-fraction 0.15 --split-seed 5"
        " --duplicates near --test-file none" in refused.stderr
    )
    # of the same images, but another model's, or under other paths
    lab.evaluate("00000000", "d2", trained_by="another", evaluated_model="models:/har@champion")
    lab.evaluate("0000000", "d2", trained_by=first, evaluated_model="models:/har@champion")
    assert cli("promote", "--test-digest", "d2").exit_code == 2
    lab.evaluate("11100000", "d2", evaluated_model="models:/har/1")
    kept = cli("promote", "--test-digest", "d2")
    assert "the champion, version 1, on 3 (37.5%)" in kept.stdout and "p = 0.0625" in kept.stdout
    lab.evaluate("11000000", "d2", trained_by=first, evaluated_model="models:/har@champion")
    assert cli("promote", "--test-digest", "d2").exit_code == 0
    assert aliases() == {"champion": best, "previous-champion": first}


def test_a_champion_of_drawings_never_stands_in_the_way(lab: Lab, cli) -> None:
    first = lab.train("1111", digest="d1", dataset="sample")
    assert cli("promote").exit_code == 0
    own = lab.train("1110", digest="d2", dataset="photos")
    result = cli("promote")
    assert result.exit_code == 0, result.output
    assert "version 1, was trained on the drawn sample only" in result.stdout
    assert aliases() == {"champion": own, "previous-champion": first}
    # the other way round they are compared as ever
    lab.train("1111", digest="d1", dataset="sample")
    kept = cli("promote", "--test-digest", "d1")
    assert kept.exit_code == 2 and "was not evaluated on the test images" in kept.stderr


def test_below_guessing_nothing_overrules(lab: Lab, cli) -> None:
    run_id = lab.train("0" * 20)
    for options in ((), ("--ignore-champion",), ("--run-id", run_id), ("--dry-run",)):
        refused = cli("promote", *options)
        assert refused.exit_code == 2 and "below the 5.0% of guessing" in refused.stderr
    assert aliases() == {}


def test_a_broken_model_is_never_promoted(lab: Lab, cli) -> None:
    good = lab.train("1000000")
    broken = lab.train("1111111", broken=True)
    for arguments in (("promote",), ("promote", "--dry-run")):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert f"the model of run {broken} fails a smoke prediction" in result.stderr
        assert "a picture gets the error the model's numbers are not finite" in result.stderr
        assert f"`mlflow runs delete --run-id {broken}`" in result.stderr
    gone = lab.train("1111111")
    (output,) = mlflow.get_run(gone).outputs.model_outputs
    shutil.rmtree(
        mlflow.get_logged_model(output.model_id).artifact_location.removeprefix("file://")
    )
    MlflowClient().delete_run(broken)
    assert f"the model of run {gone} fails a smoke" in cli("promote").stderr
    assert aliases() == {} and versions() == []
    MlflowClient().delete_run(gone)
    assert cli("promote").exit_code == 0
    assert aliases() == {"champion": good}


def test_other_images_can_start_over(lab: Lab, cli) -> None:
    """As after a champion of the sample, with photographs of one's own."""
    first = lab.train("1111")
    assert cli("promote").exit_code == 0
    lab.train("1111", digest="d2")
    best = lab.train("11100000", digest="d3")
    assert "the present champion" in cli("promote").stdout
    assert cli("promote", "--test-digest", "d3").exit_code == 2
    dry = cli("promote", "--ignore-champion", "--dry-run")
    assert dry.exit_code == 0 and aliases() == {"champion": first}
    result = cli("promote", "--ignore-champion")
    assert "promoted: not compared with the champion, version 1: --ignore-champion" in result.stdout
    assert aliases() == {"champion": best, "previous-champion": first}
    assert (
        "kept: the candidate is the present champion" in cli("promote", "--ignore-champion").stdout
    )


def test_a_run_that_was_gone_on_with_is_promoted_by_the_model_that_is_left(lab: Lab, cli) -> None:
    with lab.log("train", "1111", "d1") as run_id:
        for _ in range(3):
            log_classifier(lab.folder)
            # as when a training that was cut short after this goes on
            delete_models(run_id)
        left = log_classifier(lab.folder)
    assert len(mlflow.get_run(run_id).outputs.model_outputs) == 4
    assert cli("promote").exit_code == 0
    (version,) = MlflowClient().search_model_versions("name = 'har'")
    assert (version.run_id, version.source) == (run_id, f"models:/{left}")


def test_no_candidates_and_why(lab: Lab, cli) -> None:
    def mistake(*arguments: str) -> str:
        result = cli("promote", *arguments)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
        return result.stderr

    assert "no such experiment: hra; there are: har" in mistake("--experiment", "hra")
    assert "experiment har has no trainings" in mistake()
    lab.evaluate("11", "d1")
    assert "experiment har has no trainings" in mistake()
    with lab.log("train", "11", "d1"):
        pass
    for status in ("FINISHED", "FAILED"):
        mlflow.start_run(experiment_id=lab.experiment_id, tags={"job": "train"})
        mlflow.end_run(status)
    assert (
        "no training of experiment har can be promoted: 1 not finished, 1 without a test"
        " accuracy, 1 without a model"
    ) in mistake()
    assert "0 is not in the range" in mistake("--alpha", "0")


def test_a_crash_between_the_aliases_loses_nothing(
    lab: Lab, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lab.train("1000000")
    assert cli("promote").exit_code == 0
    best = lab.train("1111111")
    set_alias = MlflowClient.set_registered_model_alias

    def crash(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if alias == "champion":
            raise RuntimeError
        set_alias(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", crash)
    assert isinstance(cli("promote").exception, RuntimeError)
    assert aliases() == {"champion": first, "previous-champion": first}
    monkeypatch.undo()
    mlflow.set_tracking_uri(lab.uri)
    assert cli("promote").exit_code == 0
    assert aliases() == {"champion": best, "previous-champion": first}
    # the version that the crash left behind was taken up
    assert sorted(versions()) == sorted([first, best])


def test_a_champion_that_moved_meanwhile_is_not_replaced(
    lab: Lab, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train("1000000")
    assert cli("promote").exit_code == 0
    rival, best = lab.train("1100000"), lab.train("1111111")

    def move(decision: Decision) -> Decision:
        """Another machine, while this one tries the model."""
        version = mlflow.register_model(f"runs:/{rival}/model", "har").version
        MlflowClient().set_registered_model_alias("har", "champion", version)
        return decision

    with monkeypatch.context() as patch:
        patch.setattr(promotion, "refuse_broken_model", move)
        refused = cli("promote", "--alpha", "0.1")
    assert refused.exit_code == 2
    assert "another machine changed the champion meanwhile: promote again" in refused.stderr
    assert aliases() == {"champion": rival}
    # the second try compares with the rival
    assert "the champion, version 2, on 2 (28.6%)" in cli("promote", "--alpha", "0.1").stdout
    assert aliases() == {"champion": best, "previous-champion": rival}
    assert len(versions()) == 3


def waiting(command: list[str], lines: list[str]) -> subprocess.Popen:
    """A promotion that has come to the lock; what it says goes into `lines`."""
    # other tests' runs leave their experiment in the environment
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_EXPERIMENT")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**outside, "PATH": PATH, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    deadline = time.monotonic() + 240
    while not any("waiting for another promotion" in line for line in lines):
        assert process.poll() is None and time.monotonic() < deadline, lines
        time.sleep(0.2)
    return process


@pytest.mark.slow
def test_two_at_once_leave_one_champion(lab: Lab, cli) -> None:
    """One through `mlflow run`, with its record, and one typed, in this process."""
    best = lab.train("1111")
    lab.train("1000")
    launched = ["mlflow", "run", str(ROOT), "-e", "promote", "--env-manager", "local"]
    launched += ["--experiment-name", "har", "-P", "alpha=0.01"]
    said: list[str] = []
    with promotion.promotion_lock():
        process = waiting(launched, said)
    typed = cli("promote")
    assert typed.exit_code == 0 and process.wait(240) == 0, (typed.output, said)
    time.sleep(0.5)
    starts = [line.split(":")[0] for line in [*said, *typed.output.splitlines()]]
    outcomes = [each for each in starts if each in ("kept", "promoted")]
    assert sorted(outcomes) == ["kept", "promoted"], (typed.output, said)
    assert aliases() == {"champion": best} and versions() == [best]
    (run,) = mlflow.search_runs([lab.experiment_id], "tags.job = 'promote'", output_format="list")
    tags = run.data.tags
    assert run.info.status == "FINISHED" and tags["candidate"] == best
    assert tags["decision"] == outcomes[0] and "selected on test" in tags["mlflow.note.content"]


def test_a_refusal_under_mlflow_run_is_recorded(
    lab: Lab, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.train("111")
    elsewhere = replace(lab, experiment_id=mlflow.create_experiment("elsewhere"))
    broken = elsewhere.train("11", broken=True)
    client = MlflowClient()
    outside = client.create_run(elsewhere.experiment_id).info.run_id
    # as `mlflow run` does; another test's choice of experiment would be an error
    mlflow.set_experiment(experiment_id=elsewhere.experiment_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", outside)
    result = cli("promote", "--dry-run", "true")
    assert result.exit_code == 2 and "fails a smoke prediction" in result.stderr
    run = client.get_run(outside)
    assert run.info.status == "FAILED"
    wanted = {"job": "promote", "decision": "refused", "candidate": broken}
    assert {name: run.data.tags[name] for name in wanted} == wanted


def test_a_lock_that_cannot_be_had_is_named(
    lab: Lab, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAR_CACHE", str(tmp_path / "file"))
    result = cli("promote")
    assert result.exit_code == 2 and "set HAR_CACHE to another folder" in result.stderr


def test_a_store_that_cannot_be_used_is_named(cli) -> None:
    with tracking_to("sqlite:////dev/null/mlflow.db"):
        for command in ("promote", "champion"):
            result = cli(command)
            assert result.exit_code == 2, result.output
            assert "there is no /dev/null/mlflow.db" in result.stderr
