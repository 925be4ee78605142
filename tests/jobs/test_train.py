"""What a training run holds, by the contract; how it ends."""

import json
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from urllib.parse import parse_qs

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from har.data.layouts import folder_source
from har.data.manifest import Manifest, read_manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.evaluation.evaluate import evaluate, evaluate_features, tabulate_by_duplicate
from har.recipe import Recipe, digest_recipe
from har.serving.load import load_logged_model
from har.tracking import log
from har.tracking.records import Record
from har.tracking.store import neutral_tags, open_run
from har.tracking.ui import VIEW
from har.training.calibration import scale
from har.util.errors import UserError
from tests.fixtures import tiny_backbones, tiny_recipe, write_images
from tests.jobs.conftest import FINISHED, run_tiny

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


def test_run_ends_finished(run: mlflow.entities.Run) -> None:
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "v3 · lite0 · 2xCPU · images · epochs=2"


def test_the_ui_shows_a_training_experiment_and_a_view(run: mlflow.entities.Run) -> None:
    tags = mlflow.get_experiment(run.info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(tags[f"mlflow.sharedViewState.{VIEW}"])
    assert view["name"] == VIEW and VIEW in tags["mlflow.note.content"]
    known = {"metrics": run.data.metrics, "tags": run.data.tags}
    for column in json.loads(view["state"])["selectedColumns"]:
        kind, name = column.split(".")
        assert name.strip("`") in known[kind]


def test_params_say_requested_used_and_found(run: mlflow.entities.Run) -> None:
    params, recipe = run.data.params, FINISHED
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
    assert tags["differs_from_variant"] == (
        "image_size=32, backbone=efficientnet-lite0, batch_size=4, epochs=2"
    )
    assert tags["hardware"] == "2xCPU"
    assert tags["dataset"] == manifest.name
    assert tags["dataset_digest"] == manifest.dataset_digest
    assert tags["test_digest"] == manifest.test_digest
    assert tags["recipe_digest"] == digest_recipe(FINISHED)
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
    assert Recipe(**recipe["requested"]) == Recipe(**recipe["used"]) == FINISHED
    assert len(json.loads(load("history.json"))) == 2
    assert load("manifest.csv") == manifest.table.to_csv(index=False)
    assert json.loads(load("dataset.json"))["test_digest"] == manifest.test_digest
    header = "label,precision,recall,recall_low,recall_high,f1,images"
    assert load("evaluation/per_class.csv").startswith(header)
    assert load("evaluation/accuracy_by_duplicate.csv").splitlines()[1] == "yes,0,,,"
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


@pytest.mark.parametrize(
    ("variant", "runtime"),
    [
        ("v5", "tensorflow"),
        pytest.param("v6", "tensorflow", marks=pytest.mark.slow),
        ("v6", "openvino"),
        ("v7", "openvino"),
    ],
)
def test_a_model_trained_on_features_answers_images_as_was_logged(
    variant: str, runtime: str, manifest: Manifest, store: str, tiny_backbone: None
) -> None:
    """Mirror images, the temperature and the size of evaluation are part of the logged model."""
    outcome = run_tiny(tiny_recipe(variant), manifest, variant, runtime)
    logged = load_logged_model(f"runs:/{outcome.run_id}/model")
    found = evaluate(logged.classifier, manifest)
    metrics = mlflow.get_run(outcome.run_id).data.metrics
    if variant != "v5":
        temperature = metrics["temperature"]
        before = replace(found, probabilities=scale(found.probabilities, 1 / temperature))
        assert temperature != 1
        assert before.scores["accuracy"] == outcome.accuracy
        expected = before.scores["calibration_error"]
        assert metrics["calibration_error_before"] == pytest.approx(expected, abs=1e-5)
    text = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/evaluation/predictions.csv")
    before = pd.read_csv(StringIO(text))
    assert found.predictions["predicted"].tolist() == before["predicted"].tolist()
    np.testing.assert_allclose(found.predictions["probability"], before["probability"], atol=1e-5)
    assert found.scores["accuracy"] == outcome.accuracy


def test_a_model_that_disagrees_with_the_features_is_not_evaluated(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    classifier = load_logged_model(f"runs:/{run.info.run_id}/model").classifier
    features = np.zeros((len(manifest.rows("test")), 8), np.float32)
    with pytest.raises(UserError, match=r"differ by .* from those computed from features"):
        evaluate_features(
            classifier, manifest, lambda x: np.eye(3)[[0] * len(x)], features[None], 1.0
        )


def test_images_with_a_copy_in_train_are_evaluated_apart(
    run: mlflow.entities.Run, manifest: Manifest
) -> None:
    logged = load_logged_model(f"runs:/{run.info.run_id}/model")
    evaluation = evaluate(logged.classifier, manifest)
    table = manifest.table.copy()
    test, train = (table.index[table["split"] == name] for name in ("test", "train"))
    looks = table["perceptual_hash"].to_numpy()
    looks[train[:2]] = looks[test[:2]]
    leaky = replace(manifest, table=table.assign(perceptual_hash=looks))
    found = tabulate_by_duplicate(evaluation, leaky).set_index("duplicate_in_train")
    hits = evaluation.predictions.eval("label == predicted")
    assert found["images"].to_dict() == {"yes": 2, "no": len(test) - 2}
    assert found["accuracy"].to_dict() == {"yes": hits[:2].mean(), "no": hits[2:].mean()}
    assert (found["accuracy_low"] <= found["accuracy"]).all()


@pytest.fixture(scope="module")
def untested(manifest: Manifest, store_uri: str) -> tuple[Record, str]:
    """A run of v1 without a test split, and what it said."""
    without = replace(manifest, table=manifest.table.assign(split="train"))
    mlflow.set_tracking_uri(store_uri)
    with tiny_backbones(), redirect_stderr(StringIO()) as said:
        return run_tiny(tiny_recipe("v1"), without, "v1"), said.getvalue()


def test_no_test_split_no_accuracy(untested: tuple[Record, str], store: str) -> None:
    outcome, _ = untested
    metrics = mlflow.get_run(outcome.run_id).data.metrics
    assert outcome.test_metrics == {} and "train_accuracy" in metrics
    assert not TEST_METRICS & set(metrics) and "best_epoch" not in metrics


def test_exploration_is_logged(untested: tuple[Record, str], store: str) -> None:
    outcome, said = untested
    text = mlflow.artifacts.load_text(f"runs:/{outcome.run_id}/exploration.txt")
    assert "labels: 3" in text and text in said


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (UserError("no"), "FAILED"), (RuntimeError(), "FAILED")],
)
def test_interrupted_runs_keep_what_was_logged(
    error: BaseException, status: str, store: str
) -> None:
    with pytest.raises(type(error)), open_run("har-tests", {}) as run:
        mlflow.log_metric("val_accuracy", 0.5, step=1)
        raise error
    found = mlflow.get_run(run.id)
    assert found.info.status == status and found.data.metrics["val_accuracy"] == 0.5
    assert mlflow.active_run() is None


def test_a_run_outlives_its_pictures_and_tables(
    manifest: Manifest,
    store: str,
    tiny_backbone: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def raise_it(*_: object) -> None:
            raise error

        return raise_it

    monkeypatch.setattr(log.figures, "draw_confusion", fail(MemoryError()))
    monkeypatch.setattr(log.figures, "draw_mistakes", fail(RuntimeError("odd\ntext")))
    monkeypatch.setattr(log.figures, "draw_curves", fail(ValueError("Image size too large")))
    monkeypatch.setattr(log, "tabulate_by_duplicate", fail(RecursionError("deep")))
    run_id = run_tiny(tiny_recipe("v3"), manifest).run_id
    assert mlflow.get_run(run_id).info.status == "FINISHED"
    said = capsys.readouterr().err
    for line in (
        "left out: figures/confusion_matrix.png: MemoryError",
        "left out: figures/mistakes.png: odd",
        "left out: figures/learning_curves.png: Image size too large",
        "left out: evaluation/accuracy_by_duplicate.csv: deep",
    ):
        assert f"warning: {line}\n" in said
    client = MlflowClient()
    drawn = {each.path for each in client.list_artifacts(run_id, "figures")}
    assert drawn == {"figures/class_recall.png", "figures/reliability.png"}
    tables = {each.path for each in client.list_artifacts(run_id, "evaluation")}
    assert {"evaluation/confusion.csv", "evaluation/predictions.csv"} <= tables


def test_a_run_names_no_home_folder_and_no_login(
    tmp_path: Path, store: str, tiny_backbone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "alice"
    raw = write_images(home / "photos")
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER"):
        monkeypatch.setenv(name, "alice")
    found = prepare(folder_source(raw, why="a test"), home / "prepared", Split(test_fraction=0.25))
    run = mlflow.get_run(run_tiny(tiny_recipe("v3"), found).run_id)
    assert run.data.tags["mlflow.user"] == "unknown"
    (source,) = {each.dataset.source for each in run.inputs.dataset_inputs}
    assert json.loads(source)["uri"] == "~/photos"
    (model,) = mlflow.search_logged_models(
        [run.info.experiment_id],
        filter_string=f"source_run_id = '{run.info.run_id}'",
        output_format="list",
    )
    texts = [json.dumps([run.data.tags, run.data.params, model.tags])]
    get = mlflow.artifacts.download_artifacts
    folders = [
        Path(get(run_id=run.info.run_id, dst_path=str(tmp_path / "run"))),
        Path(get(f"models:/{model.model_id}", dst_path=str(tmp_path / "model"))),
    ]
    for folder in folders:
        texts += [
            file.read_text(encoding="utf-8", errors="replace")
            for file in folder.rglob("*")
            if file.is_file() and file.suffix not in (".png", ".keras", ".pyc")
        ]
    # MLflow itself writes the place of a local store
    lines = [line for text in texts for line in text.splitlines() if "artifact_path" not in line]
    assert [line for line in lines if str(home) in line] == []
    # the folder of a run is as good as a prepared one
    assert read_manifest(folders[0]).root == raw


def test_a_run_on_a_server_names_the_servers_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert neutral_tags()["mlflow.user"] == "unknown"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "team")
    assert neutral_tags()["mlflow.user"] == "team"
