"""What a run holds, by the contract; how it ends; under `mlflow run` and without."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from urllib.parse import parse_qs

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import read_csv, tiny_recipe, write_csv
from mlflow import MlflowClient

from har import store as mlflow_store
from har.errors import UserError
from har.evaluation import compare_siblings, evaluate, judge_features
from har.experiment import evaluate_logged
from har.manifest import Manifest
from har.packaging import load_served
from har.recipe import Recipe, digest
from har.recorded import load_logged
from har.splits import Split
from har.trials import Outcome, build_trial, run_trial
from har.ui import VIEW

EPOCH_METRICS = {
    "train_loss", "train_accuracy", "train_top_3_accuracy", "val_loss", "val_accuracy",
    "val_top_3_accuracy", "epoch_time_s", "images_per_second",
}  # fmt: skip
FINAL_METRICS = {
    "accuracy", "accuracy_low", "accuracy_high", "top_3_accuracy", "macro_f1", "log_loss",
    "calibration_error", "latency_ms", "latency_p95_ms", "best_epoch", "best_val_accuracy",
    "train_time_s", "peak_memory_mb", "wall_time_s",
}  # fmt: skip
TEST_METRICS = FINAL_METRICS - {
    "latency_ms", "latency_p95_ms", "best_epoch", "best_val_accuracy", "train_time_s",
    "peak_memory_mb", "wall_time_s",
}  # fmt: skip


def run_tiny(recipe: Recipe, manifest: Manifest, variant: str = "v3") -> Outcome:
    trial = build_trial(variant, recipe, ("backbone", "epochs"), manifest)
    return run_trial(trial, "har-tests", started=0.0)


@pytest.fixture(scope="module")
def finished(manifest: Manifest, store_uri: str) -> Outcome:
    """One finished run of v3 that the tests below look at."""
    from conftest import build_tiny

    from har import backbones
    from har.backbones import Backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.BACKBONES, "efficientnet-lite0", Backbone(build_tiny, build_tiny))
        mlflow.set_tracking_uri(store_uri)
        return run_tiny(tiny_recipe(), manifest)


@pytest.fixture
def run(finished: Outcome, store: str) -> mlflow.entities.Run:
    return mlflow.get_run(finished.run_id)


def test_run_ends_finished(run: mlflow.entities.Run) -> None:
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "v3 · lite0 · 2xCPU"


def test_the_ui_shows_a_training_experiment_and_a_view(run: mlflow.entities.Run) -> None:
    tags = mlflow.get_experiment(run.info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])
    assert view["name"] == VIEW and VIEW in tags["mlflow.note.content"]
    known = {"metrics": run.data.metrics, "tags": run.data.tags}
    for column in json.loads(view["state"])["selectedColumns"]:
        kind, name = column.split(".")
        assert name.strip("`") in known[kind]


def test_what_the_user_set_up_stays(store: str) -> None:
    experiment = mlflow.set_experiment("har-mine").experiment_id
    client = MlflowClient()
    client.set_experiment_tag(experiment, "mlflow.note.content", "mine")
    with mlflow_store.open_run("har-mine", {}):
        pass
    assert client.get_experiment(experiment).tags["mlflow.note.content"] == "mine"


def test_params_say_requested_used_and_found(run: mlflow.entities.Run) -> None:
    params, recipe = run.data.params, tiny_recipe()
    for name, value in asdict(recipe).items():
        plain = name in ("precision", "strategy", "backbone")
        # under one name, so that the UI shows one column
        assert params[name if plain else f"recipe.{name}"] == str(value)
        assert not plain or f"recipe.{name}" not in params
    assert params["variant"] == "v3"
    assert params["precision"] == params["used.precision"] == "float32"
    assert params["strategy"] == params["used.strategy"] == "mirrored"
    assert params["backbone"] == params["used.backbone"] == "efficientnet-lite0"
    assert params["used.batch_size"] == "4" and params["runtime"] == "auto"
    assert (params["gpu_type"], params["num_gpus"], params["num_replicas"]) == ("none", "0", "2")
    assert params["test_fraction"] == "0.25" and params["split_seed"] == "0"
    assert (params["duplicates"], params["test_file"]) == ("near", "none")


def test_metrics_are_the_contracts(run: mlflow.entities.Run) -> None:
    ours = {name for name in run.data.metrics if not name.startswith("system/")}
    assert ours == EPOCH_METRICS | FINAL_METRICS
    client = MlflowClient()
    for name in EPOCH_METRICS:
        steps = [each.step for each in client.get_metric_history(run.info.run_id, name)]
        assert steps == [1, 2]
    for name in FINAL_METRICS:
        assert len(client.get_metric_history(run.info.run_id, name)) == 1
    assert run.data.metrics["accuracy_low"] <= run.data.metrics["accuracy"]


def test_tags_find_the_run(run: mlflow.entities.Run, manifest: Manifest) -> None:
    tags = run.data.tags
    assert (tags["job"], tags["variant"]) == ("train", "v3")
    assert tags["changed"] == ("image_size=32, backbone=efficientnet-lite0, batch_size=4, epochs=2")
    assert tags["hardware"] == "2xCPU"
    assert tags["dataset"] == manifest.name
    assert tags["dataset_digest"] == manifest.dataset_digest
    assert tags["test_digest"] == manifest.test_digest
    assert tags["recipe_digest"] == digest(tiny_recipe())
    assert "**v3** on 2xCPU" in tags["mlflow.note.content"]
    assert f"{run.data.metrics['accuracy']:.1%}" in tags["mlflow.note.content"]


def test_links_in_the_description_lead_to_artifacts(run: mlflow.entities.Run) -> None:
    note = run.data.tags["mlflow.note.content"]
    queries = [parse_qs(q) for q in re.findall(r"\(get-artifact\?(.*?)\)", note)]
    assert len(queries) == 5
    for query in queries:
        assert query["run_uuid"] == [run.info.run_id]
        uri = f"runs:/{run.info.run_id}/{query['path'][0]}"
        assert Path(mlflow.artifacts.download_artifacts(uri)).stat().st_size > 1000


def test_data_set_is_the_manifest_under_our_digest(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    names = {(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs}
    assert names == {(manifest.name, manifest.dataset_digest)}


def test_artifacts(run: mlflow.entities.Run, manifest: Manifest) -> None:
    def load(path: str) -> str:
        return mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{path}")

    recipe = json.loads(load("recipe.json"))
    assert Recipe(**recipe["requested"]) == Recipe(**recipe["used"]) == tiny_recipe()
    assert len(json.loads(load("history.json"))) == 2
    assert load("manifest.csv") == manifest.table.to_csv(index=False)
    assert json.loads(load("dataset.json"))["test_digest"] == manifest.test_digest
    header = "label,precision,recall,recall_low,recall_high,f1,images"
    assert load("evaluation/per_class.csv").startswith(header)
    assert load("evaluation/siblings.csv").splitlines()[1] == "yes,0,,,"
    client = MlflowClient()
    figures = {f.path for f in client.list_artifacts(run.info.run_id, "figures")}
    drawn = ("learning_curves", "confusion_matrix", "class_recall", "reliability", "mistakes")
    assert figures == {f"figures/{name}.png" for name in drawn}


def test_model_answers_bytes(run: mlflow.entities.Run, manifest: Manifest) -> None:
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    rows = manifest.rows("test")
    files = [(manifest.root / path).read_bytes() for path in rows["path"]]
    answers = model.predict(pd.DataFrame({"image": [*files, b"junk"]}))
    hits = [a["label"] == label for a, label in zip(answers[:-1], rows["label"], strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(run.data.metrics["accuracy"])
    assert answers[-1]["error"] and answers[-1]["label"] is None
    requirements = mlflow.pyfunc.get_model_dependencies(f"runs:/{run.info.run_id}/model")
    pinned = Path(requirements).read_text().split()
    assert all("==" in line for line in pinned) and "har" not in {p.split("==")[0] for p in pinned}


def test_a_model_trained_on_features_answers_images_as_was_logged(
    manifest: Manifest, store: str, tiny_backbone: None
) -> None:
    outcome = run_tiny(tiny_recipe("v5"), manifest, "v5")
    logged = load_logged(f"runs:/{outcome.run_id}/model")
    found = evaluate(logged.classifier, manifest)
    text = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/evaluation/predictions.csv")
    before = pd.read_csv(StringIO(text))
    assert found.predictions["predicted"].tolist() == before["predicted"].tolist()
    np.testing.assert_allclose(found.predictions["probability"], before["probability"], atol=1e-5)
    assert found.scores.accuracy == outcome.scores.accuracy


def test_a_model_that_disagrees_with_the_features_is_not_judged(
    manifest: Manifest, store: str, tiny_backbone: None
) -> None:
    outcome = run_tiny(tiny_recipe("v5"), manifest, "v5")
    classifier = load_logged(f"runs:/{outcome.run_id}/model").classifier
    features = np.zeros((len(manifest.rows("test")), 8), np.float32)
    with pytest.raises(UserError, match=r"differ by .* from those computed from features"):
        judge_features(classifier, manifest, lambda x: np.eye(3)[[0] * len(x)], features)


def test_evaluate_gives_the_numbers_that_training_logged(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    uri = f"runs:/{run.info.run_id}/model"
    evaluation, robustness = evaluate_logged(load_logged(uri), manifest, "har-tests")
    logged = {name: run.data.metrics[name] for name in TEST_METRICS}
    assert asdict(evaluation.scores) == logged
    assert robustness is not None and robustness["accuracy"][0] == logged["accuracy"]
    (latest,) = mlflow.search_runs(
        experiment_names=["har-tests"],
        filter_string=f"tags.evaluated_model = '{uri}'",
        output_format="list",
    )
    assert {k: latest.data.metrics[k] for k in TEST_METRICS} == logged
    assert latest.info.run_name == "evaluate · v3 · lite0 · 2xCPU"
    assert latest.data.tags["trained_by"] == run.info.run_id
    uri = f"runs:/{latest.info.run_id}/evaluation/robustness.csv"
    assert mlflow.artifacts.load_text(uri) == robustness.to_csv(index=False)


def test_images_with_a_copy_in_train_are_judged_apart(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    logged = load_logged(f"runs:/{run.info.run_id}/model")
    evaluation = evaluate(logged.classifier, manifest)
    table = manifest.table.copy()
    test, train = (table.index[table["split"] == name] for name in ("test", "train"))
    looks = table["perceptual_hash"].to_numpy()
    looks[train[:2]] = looks[test[:2]]
    leaky = replace(manifest, table=table.assign(perceptual_hash=looks))
    found = compare_siblings(evaluation, leaky).set_index("sibling_in_train")
    hits = evaluation.predictions.eval("label == predicted")
    assert found["images"].to_dict() == {"yes": 2, "no": len(test) - 2}
    assert found["accuracy"].to_dict() == {"yes": hits[:2].mean(), "no": hits[2:].mean()}
    assert (found["accuracy_low"] <= found["accuracy"]).all()


def test_preparation_is_a_run_with_its_report(raw: Path, store: str, cli) -> None:
    shutil.copy(raw / "train" / "Image_1.jpg", raw / "train" / "copy.jpg")
    write_csv(raw, [*read_csv(raw), ("copy.jpg", "sitting")])
    result = cli("prepare", "--data", raw, "--out", "out", "--experiment", "har-prepare")
    assert result.exit_code == 0, result.output
    (run,) = mlflow.search_runs(experiment_names=["har-prepare"], output_format="list")
    assert run.info.run_name == "prepare · raw" and run.data.tags["job"] == "prepare"
    counts = {name: run.data.params[name] for name in ("images", "duplicate_groups", "leaks")}
    assert counts == {"images": "43", "duplicate_groups": "1", "leaks": "0"}
    assert run.data.params["duplicates"] == "near"
    assert len(run.inputs.dataset_inputs) == 1
    report = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.html")
    assert report == Path("out/report.html").read_text() and "copy.jpg" in report
    copies = mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/duplicates.csv")
    assert len(copies.splitlines()) == 3
    figures = MlflowClient().list_artifacts(run.info.run_id, "figures")
    assert {each.path for each in figures} == {"figures/class_balance.png", "figures/samples.png"}


def test_moved_images_are_prepared_anew_by_option(raw: Path, store: str, cli) -> None:
    assert cli("prepare", "--data", raw, "--out", "out").exit_code == 0
    moved = raw.rename(raw.parent / "moved")
    failed = cli("prepare", "--data", "out", "--out", "again")
    assert failed.exit_code == 2 and "--images" in failed.output
    result = cli("prepare", "--data", "out", "--images", moved, "--out", "again")
    assert result.exit_code == 0, result.output
    described = json.loads(Path("again/dataset.json").read_text())
    assert described["root"] == str(moved)


def test_bad_data_leaves_no_run_behind(raw: Path, store: str, cli) -> None:
    write_csv(raw, [(name, "calling") for name, _ in read_csv(raw)])
    result = cli("prepare", "--data", raw, "--out", "out", "--experiment", "har-none")
    assert result.exit_code == 2 and "every row is labelled 'calling'" in result.output
    found = mlflow.get_experiment_by_name("har-none")
    assert mlflow.search_runs([found.experiment_id], output_format="list") == []


def test_a_model_is_not_judged_on_what_it_was_trained_on(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    logged = load_logged(f"runs:/{run.info.run_id}/model")
    assert logged.split == Split(test_fraction=0.25, split_seed=0)
    table = manifest.table.copy()
    table.loc[table.index[table["split"] == "train"][:2], "split"] = "test"
    with pytest.raises(UserError, match=r"2 of the \d+ test images .*--test-fraction 0.25"):
        evaluate_logged(logged, replace(manifest, table=table), "har-tests")


def test_no_test_split_no_accuracy(tiny_backbone: None, manifest: Manifest, store: str) -> None:
    untested = replace(manifest, table=manifest.table.assign(split="train"))
    outcome = run_tiny(tiny_recipe("original"), untested, "original")
    metrics = mlflow.get_run(outcome.run_id).data.metrics
    assert outcome.scores is None and "train_accuracy" in metrics
    assert not TEST_METRICS & set(metrics) and "best_epoch" not in metrics


def test_exploration_is_logged(
    tiny_backbone: None, manifest: Manifest, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run_tiny(tiny_recipe("v1"), manifest, "v1")
    text = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/exploration.txt")
    assert "labels: 3" in text and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (UserError("no"), "FAILED"), (RuntimeError(), "FAILED")],
)
def test_interrupted_runs_keep_what_was_logged(
    error: BaseException, status: str, store: str
) -> None:
    with pytest.raises(type(error)), mlflow_store.open_run("har-tests", {}) as run_id:
        mlflow.log_metric("val_accuracy", 0.5, step=1)
        raise error
    found = mlflow.get_run(run_id)
    assert found.info.status == status and found.data.metrics["val_accuracy"] == 0.5
    assert mlflow.active_run() is None


def test_system_metrics_never_stop_a_run(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics import system_metrics_monitor

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such sensor")

    monkeypatch.setattr(system_metrics_monitor, "CPUMonitor", fail)
    with mlflow_store.open_run("har-tests", {}) as run_id:
        mlflow.log_metric("accuracy", 0.5)
    assert mlflow.get_run(run_id).info.status == "FINISHED"


def test_joins_the_run_that_mlflow_run_opened(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    experiment = mlflow.set_experiment("har-tests")
    outside = client.create_run(experiment.experiment_id)
    client.log_param(outside.info.run_id, "precision", "Float32")
    monkeypatch.setenv("MLFLOW_RUN_ID", outside.info.run_id)
    with mlflow_store.open_run("ignored", {"variant": "v3"}) as run_id:
        mlflow_store.log_missing_params({"precision": "float32", "strategy": "mirrored"})
    assert run_id == outside.info.run_id
    params = client.get_run(run_id).data.params
    assert params == {"precision": "Float32", "strategy": "mirrored"}


def test_a_store_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri("sqlite:////dev/null/mlflow.db")
    try:
        with (
            pytest.raises(UserError, match=r"sqlite:////dev/null/mlflow.db cannot be used"),
            mlflow_store.open_run("har-tests", {}),
        ):
            pass
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.parametrize("uri", ["runs:/0123456789abcdef0123456789abcdef/model", "models:/no@one"])
def test_unknown_model_is_named(uri: str, store: str) -> None:
    with pytest.raises(UserError, match=f"no model at {uri}"):
        load_logged(uri)


@pytest.mark.parametrize("server", ["none", "silent"])
def test_a_server_that_does_not_answer_is_said_before_any_work(server: str, raw: Path) -> None:
    """Nobody listens, or somebody who never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "silent":
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "har", "run", "--data", str(raw)],
            env={**os.environ, "MLFLOW_TRACKING_URI": f"http://ana:confidential@{address}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"the tracking store http://{address} cannot be used" in said
    assert "confidential" not in said
    assert "--offline or MLFLOW_TRACKING_URI=sqlite:///mlflow.db records" in said
    assert "checking images" not in said and "Traceback" not in said
    # imports of TensorFlow and MLflow are in it, on a busy machine
    assert time.monotonic() - began < 60


def test_offline_records_here(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "har", "import-notebooks", "--offline"]
    away = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    done = subprocess.run(words, env=away, cwd=tmp_path, capture_output=True, text=True, check=True)
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert {run.info.run_id for run in runs} == set(done.stdout.split()[1::2]) and len(runs) == 5
    under_mlflow = {**away, "MLFLOW_RUN_ID": "0" * 32}
    refused = subprocess.run(words, env=under_mlflow, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--offline is not for `mlflow run`" in refused.stderr


class Pickled(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input):  # type: ignore[no-untyped-def]
        return model_input


def test_a_pickled_model_is_never_loaded(store: str, tmp_path: Path) -> None:
    """Reading it would run whatever its maker likes."""
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=Pickled(), pip_requirements=[])
    assert list((tmp_path / "model").glob("*.pkl"))
    mlflow_store.quiet_mlflow()
    with pytest.raises(UserError, match=r"cannot be loaded.*PICKLE"):
        load_served(str(tmp_path / "model"))
