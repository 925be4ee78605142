"""`mlflow run docker`, and on Kubernetes, run without either: MLflow's own functions make the
commands and the job, which are then checked.
"""

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.projects import _parse_kubernetes_config
from mlflow.projects.backend.local import _get_docker_command
from mlflow.projects.utils import get_entry_point_command, load_project

from har.cli.main import main
from tests.system.test_docker import DOCKER, ROOT, instructions

JOB = DOCKER / "kubernetes/job.yaml"


def entry_points(folder: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load((folder / "MLproject").read_text())["entry_points"]


def test_entry_points_are_those_without_docker() -> None:
    """Only the program is named otherwise: in the image it is installed."""
    plain = entry_points(ROOT)
    for name, entry in entry_points(DOCKER).items():
        assert entry["parameters"] == plain[name]["parameters"]
        assert entry["command"] == plain[name]["command"].replace("python -m har", "har")


def test_docker_gets_a_whole_command(store: str) -> None:
    project = load_project(str(DOCKER))
    # an ENTRYPOINT would come before it
    assert "ENTRYPOINT" not in dict(instructions("Dockerfile"))
    (said,) = get_entry_point_command(project, "main", {"variant": "v4", "epochs": "2"}, None)
    words = shlex.split(said)
    assert words[:2] == ["har", "run"] and words[-2:] == ["--epochs", "2"]
    context = main.commands["run"].make_context("run", words[2:])
    assert context.params["variant"] == "v4" and context.params["data"] == "auto"
    with mlflow.start_run() as run:
        image = SimpleNamespace(tags=[project.docker_env["image"]])
        given = {"gpus": "all", "volume": "/photos:/data:ro"}
        docker = _get_docker_command(image, run, given, project.docker_env["volumes"])
    assert docker[:3] == ["docker", "run", "--rm"] and docker[-1] == "har"
    assert docker[3:7] == ["--gpus", "all", "--volume", "/photos:/data:ro"]
    assert "har:/home/har" in docker
    assert f"MLFLOW_RUN_ID={run.info.run_id}" in docker


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The job as MLflow starts it."""
    monkeypatch.chdir(ROOT)
    backend = json.loads((DOCKER / "kubernetes/backend.json").read_text())
    template = _parse_kubernetes_config(backend)["kube-job-template"]
    # MLflow's module imports the cluster's client, which only a cluster needs
    client, config = ModuleType("kubernetes"), ModuleType("kubernetes.config.config_exception")
    config.ConfigException = Exception  # type: ignore[attr-defined]
    for name, module in (
        ("kubernetes", client),
        ("kubernetes.config", ModuleType("kubernetes.config")),
        ("kubernetes.config.config_exception", config),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mlflow.projects.kubernetes", raising=False)
    from mlflow.projects import kubernetes as backend_module

    monkeypatch.delitem(sys.modules, "mlflow.projects.kubernetes", raising=False)
    project = load_project(str(DOCKER))
    command = get_entry_point_command(project, "main", {"data": "/data"}, None)
    return backend_module._get_kubernetes_job_definition(
        project.name,
        f"{backend['repository-uri']}:1234567",
        f"sha256:{'0' * 64}",
        backend_module._get_run_command(command),
        {"MLFLOW_RUN_ID": "0" * 32, "MLFLOW_TRACKING_URI": "https://mlflow.example.com"},
        template,
    )


def test_kubernetes_knows_the_job(job: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for each in (yaml.safe_load(JOB.read_text()), job):
        validate.validate(each, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError):
        spec = {**job["spec"], "backofLimit": 0}
        validate.validate({**job, "spec": spec}, validate.latest_version(), strict=True)


def test_the_job_is_bounded_and_may_nothing(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["har", "run", "--variant", "v3", "--data", "/data"]
    assert container["image"].startswith("registry.example.com/har:1234567@sha256:")
    variables = [each["name"] for each in container["env"]]
    assert len(set(variables)) == len(variables) and "MLFLOW_RUN_ID" in variables
    # a password is in a secret of the cluster
    (password,) = (each for each in container["env"] if each["name"].endswith("PASSWORD"))
    assert "value" not in password and password["valueFrom"]["secretKeyRef"]["optional"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    user = dict(instructions("Dockerfile"))["USER"]
    assert pod["securityContext"]["runAsUser"] == int(user)
    allowed = container["securityContext"]
    assert allowed["readOnlyRootFilesystem"] and not allowed["allowPrivilegeEscalation"]
    assert allowed["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in container["resources"]["limits"]
    mounted = {each["name"]: each for each in container["volumeMounts"]}
    assert set(mounted) == {each["name"] for each in pod["volumes"]}
    assert mounted["data"]["readOnly"] and container["workingDir"] == mounted["work"]["mountPath"]
    assert job["spec"]["backoffLimit"] == 0
