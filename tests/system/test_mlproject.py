"""The product as its users start it: the real `mlflow run`, a real tracking server over HTTP,
the real `mlflow models serve`.
"""

import base64
import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from hypothesis import given
from mlflow import MlflowClient

from har.compare.twins import link_twins
from har.data.prepare import load_manifest
from har.evaluation.evaluate import Evaluation, evaluate
from har.serving.load import load_logged_model
from tests.fixtures import PATH, free_port, serving, tracking_server, tracking_to, write_images
from tests.serving.test_pyfunc import (
    BODIES,
    JSON,
    Answer,
    Ask,
    as_json,
    assert_as_evaluated,
    assert_only_bad_rows_are_bad,
    check_answer,
    fuzz,
    parse,
    requests,
    rows_of,
)

ROOT = Path(__file__).parents[2]


EXPERIMENT = "har-mlproject"


TINY = {"image-size": 32, "batch-size": 4, "epochs": 1, "test-fraction": 0.25}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tracking_server(tmp_path_factory.mktemp("server")) as address, tracking_to(address):
        yield address


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a space in the name: quoting is mlflow's and ours to get right
    return write_images(tmp_path_factory.mktemp("mlproject") / "my images")


def mlflow_run(server: str, entry: str = "main", **parameters: object) -> subprocess.Popen:
    # mlflow leaves the experiment of this process's runs in its environment
    outside = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_EXPERIMENT")}
    pairs = [f"-P{name}={value}" for name, value in parameters.items()]
    return subprocess.Popen(
        [
            "mlflow",
            "run",
            ROOT,
            "-e",
            entry,
            "--env-manager",
            "local",
            "--experiment-name",
            EXPERIMENT,
            *pairs,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**outside, "PATH": PATH, "MLFLOW_TRACKING_URI": server},
        start_new_session=True,
    )


def latest_run() -> mlflow.entities.Run:
    (run,) = mlflow.search_runs(experiment_names=[EXPERIMENT], max_results=1, output_format="list")
    return run


@pytest.fixture(scope="module")
def finished(server: str, images: Path) -> mlflow.entities.Run:
    process = mlflow_run(server, variant="v4", data=images, precision="mixed_bfloat16", **TINY)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    run = latest_run()
    assert run.info.run_id in out and "v4" in out
    return run


def test_mlflow_run_records_one_finished_run(finished: mlflow.entities.Run, images: Path) -> None:
    assert finished.info.status == "FINISHED"
    params = finished.data.params
    # as mlflow logged them, from what was typed
    assert (params["variant"], params["data"].strip("'")) == ("v4", str(images))
    assert params["image-size"] == "32"
    # as we logged them
    assert params["precision"] == params["used.precision"] == "mixed_bfloat16"
    assert params["recipe.image_size"] == "32" and params["backbone"] == "efficientnetb7"
    assert params["used.backbone"] == "efficientnet-lite0"
    assert "accuracy" in finished.data.metrics and "val_accuracy" in finished.data.metrics
    assert finished.info.run_name.startswith("v4 · lite0 · 1xCPU · my images · ")
    assert len(mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")) == 1


def test_a_mistake_fails_clearly_and_leaves_no_running_run(
    server: str, finished: mlflow.entities.Run
) -> None:
    """Other mistakes are tried without `mlflow run`, in tests/cli."""
    process = mlflow_run(server, data="/no/such folder")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "no such folder: /no/such folder" in err
    assert latest_run().info.status == "FAILED"


@pytest.mark.slow
def test_ctrl_c_on_mlflow_run_leaves_no_running_run(
    server: str, finished: mlflow.entities.Run, images: Path
) -> None:
    process = mlflow_run(server, data=images, **{**TINY, "epochs": 5000, "patience": 0})
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to mlflow and to us
    _, rest = process.communicate(timeout=120)
    run = latest_run()
    # We end it as KILLED; mlflow 3.17 then writes FAILED over any status (its own check for a
    # run that has ended compares a string with numbers).
    assert run.info.status in ("KILLED", "FAILED") and rest.count("stopped") == 1, rest
    assert "val_accuracy" in run.data.metrics


@pytest.fixture(scope="module")
def model_server(
    server: str, finished: mlflow.entities.Run, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    # outside the checkout: the model brings its own code
    command = ["mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", f"runs:/{finished.info.run_id}/model"]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = {"MLFLOW_TRACKING_URI": server, "PYTHONSAFEPATH": "1"}
    with serving(command, free_port(), log, **environment) as address:
        yield address


def ask(address: str, body: dict) -> list[dict]:
    request = urllib.request.Request(
        f"{address}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["predictions"]


def test_served_equals_evaluated(
    model_server: str, finished: mlflow.entities.Run, images: Path
) -> None:
    text = mlflow.artifacts.load_text(f"runs:/{finished.info.run_id}/evaluation/predictions.csv")
    evaluated = pd.read_csv(StringIO(text))
    files = [(images / path).read_bytes() for path in evaluated["path"]]
    rows = [[base64.b64encode(data).decode()] for data in [*files, b"junk"]]
    *served, bad = ask(model_server, {"dataframe_split": {"columns": ["image"], "data": rows}})
    assert [row["label"] for row in served] == evaluated["predicted"].tolist()
    assert [row["probability"] for row in served] == pytest.approx(
        evaluated["probability"].tolist(), rel=1e-5
    )
    assert all(row["error"] is None and len(row["top_3"]) == 3 for row in served)
    assert bad["label"] is None and "not an image" in bad["error"]
    records = [{"image": row[0]} for row in rows[:2]]
    assert ask(model_server, {"dataframe_records": records}) == [
        {**row, "probability": pytest.approx(row["probability"]), "top_3": again["top_3"]}
        for row, again in zip(
            served[:2], ask(model_server, {"dataframe_records": records}), strict=True
        )
    ]


@pytest.fixture(scope="module")
def evaluated(finished: mlflow.entities.Run, images: Path) -> Evaluation:
    """What `har evaluate` finds of the served model, in this process."""
    logged = load_logged_model(f"runs:/{finished.info.run_id}/model")
    manifest = load_manifest(str(images), {"test_fraction": TINY["test-fraction"]})
    return evaluate(logged.classifier, manifest)


@pytest.fixture(scope="module")
def files(evaluated: Evaluation, images: Path) -> list[bytes]:
    """The test images, in the evaluation's order."""
    return [(images / path).read_bytes() for path in evaluated.paths]


def ask_over_http(address: str) -> Ask:
    def ask(body: bytes, content_type: str) -> Answer:
        request = urllib.request.Request(
            f"{address}/invocations", body, {"Content-Type": content_type}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return ask


@pytest.mark.parametrize("kind", BODIES)
def test_every_body_is_answered_as_evaluated(
    model_server: str, files: list[bytes], evaluated: Evaluation, kind: str
) -> None:
    build, content_type = BODIES[kind]
    assert_as_evaluated(rows_of(ask_over_http(model_server)(build(files), content_type)), evaluated)


@pytest.mark.parametrize("kind", ["dataframe_split", "parquet", "inputs"])
def test_served_bad_row_spoils_no_other(model_server: str, files: list[bytes], kind: str) -> None:
    assert_only_bad_rows_are_bad(ask_over_http(model_server), kind, files)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", JSON, 400),
        (b"{", JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b"[]", JSON, 400),
        (b"3", JSON, 400),
        (as_json({}), JSON, 400),
        (as_json({"inputs": "abc"}), JSON, 400),
        (as_json({"inputs": 3}), JSON, 400),
        (as_json({"inputs": None}), JSON, 400),
        (as_json({"inputs": {"picture": ["abc"]}}), JSON, 400),
        (as_json({"instances": [], "inputs": []}), JSON, 400),
        (as_json({"dataframe_split": 3}), JSON, 400),
        (as_json({"dataframe_split": {"columns": ["x"], "data": [["AAAA"]]}}), JSON, 400),
        (as_json({"dataframe_split": {"columns": ["image"], "data": [["abc"]]}}), JSON, 200),
        (as_json({"dataframe_split": {"columns": ["image"], "data": [[None]]}}), JSON, 200),
        (as_json({"dataframe_split": {"columns": ["image"] * 2, "data": []}}), JSON, 400),
        (as_json({"dataframe_split": {"columns": ["image"], "data": []}}), JSON, 200),
        (as_json({"inputs": [["AAAA"], ["AAAA"]]}), JSON, 200),
        (as_json({"inputs": [1, None, {}]}), JSON, 200),
        (b"image\nAAAA\n", "text/csv", 415),
        (b"\xff\xd8\xff", "image/jpeg", 415),
    ],
)
def test_junk_is_answered(model_server: str, body: bytes, content_type: str, status: int) -> None:
    found, text = ask_over_http(model_server)(body, content_type)
    assert found == status, text
    assert "Traceback" not in text
    if status == 200:
        assert all(row["error"] for row in rows_of((found, text)))
    elif status == 400:
        parse(text)


@pytest.mark.slow
@fuzz(400)
@given(body=requests())
def test_any_json_over_http(model_server: str, body: bytes) -> None:
    check_answer(ask_over_http(model_server)(body, JSON))
    with urllib.request.urlopen(f"{model_server}/health", timeout=30) as answer:
        assert answer.status == 200


def test_description_links_the_run(finished: mlflow.entities.Run) -> None:
    note = MlflowClient().get_run(finished.info.run_id).data.tags["mlflow.note.content"]
    assert "**v4** on 1xCPU" in note
    # escaped for Markdown
    assert "backbone=efficientnet-lite0" in note.replace("\\", "")


def test_classify_by_server_and_by_model_agree(
    model_server: str, finished: mlflow.entities.Run, images: Path, tmp_path: Path, cli
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"junk")
    files = [images / "train" / "Image_1.jpg", images / "train" / "Image_2.jpg", tmp_path]
    uri = f"runs:/{finished.info.run_id}/model"
    answers = []
    for model in (("--url", model_server), ("--model", uri)):
        result = cli("classify", *files, *model, "--json")
        assert result.exit_code == 0, result.output
        answers.append([json.loads(line) for line in result.stdout.splitlines()])
    for by_server, by_model in zip(*answers, strict=True):
        for name in ("filename", "label", "error"):
            assert by_server[name] == by_model[name]
    assert answers[0][0]["probability"] == pytest.approx(answers[1][0]["probability"], rel=1e-5)
    assert answers[0][2]["label"] is None and "not an image" in answers[0][2]["error"]
    shown = cli("classify", files[0], "--url", model_server)
    assert answers[0][0]["label"] in shown.stdout


def test_classify_without_a_server_says_so(images: Path, cli) -> None:
    result = cli("classify", images / "train", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 2 and "no answer from http://127.0.0.1" in result.stderr


def test_predict_scores_a_folder(
    finished: mlflow.entities.Run, images: Path, tmp_path: Path, cli
) -> None:
    uri, out = f"runs:/{finished.info.run_id}/model", tmp_path / "p.csv"
    result = cli("predict", "--data", images / "train", "--out", out, "--model", uri)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out)
    assert len(table) == len(list((images / "train").iterdir())) and table["error"].isna().all()
    assert set(table["label"]) <= {"sitting", "running", "texting"}


def record_training(hardware: str) -> str:
    """A run as a training leaves it, without the training."""
    client = MlflowClient()
    tags = {"recipe_digest": "r", "dataset_digest": "d", "test_digest": "t", "job": "train"}
    tags |= {"variant": "v3", "differs_from_variant": "none", "hardware": hardware}
    run_id = client.create_run("0", tags=tags).info.run_id
    client.log_metric(run_id, "wall_time_s", 10.0)
    client.log_metric(run_id, "accuracy", 0.5)
    table = "path,label,predicted\na,x,x\nb,x,y\n"
    client.log_text(run_id, table, "evaluation/predictions.csv")
    return run_id


@pytest.mark.slow
def test_a_search_of_two_fields_in_one_option(server: str, images: Path, tmp_path: Path) -> None:
    """Its parent is the run that mlflow opened; the server holds trials and winner under it."""
    fields = "learning_rate=log:1e-4:1e-2 head=gap_dropout,linear_probe"
    options = {**TINY, "variant": "v5", "data": images, "trials": 3, "param": fields}
    options["storage"] = f"sqlite:///{tmp_path}/optuna.db"
    process = mlflow_run(server, "sweep", **options)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "3 trials" in printed and "har run --variant v5" in printed
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")
    (parent,) = [run for run in runs if run.data.tags.get("job") == "sweep"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["job"] for run in children) == ["train", *["trial"] * 3]
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}


def test_runs_that_end_at_once_are_linked_to_each_other(server: str) -> None:
    runs = [record_training(hardware) for hardware in ("1xP100", "2xT4", "1xCPU")]
    together = threading.Barrier(len(runs))

    def end(run_id: str) -> None:
        together.wait()
        MlflowClient().set_terminated(run_id)
        link_twins(run_id)

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(end, runs))
    for run_id in runs:
        tags = MlflowClient().get_run(run_id).data.tags
        linked = {value for name, value in tags.items() if name.startswith("twin.")}
        assert linked == set(runs) - {run_id}
