"""`har predict --executor ray`: the rows of one process, by actors that may die."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from har.data.manifest import Manifest
from har.inference import shards
from har.inference.classifier import CLASSIFIER_FOLDER, save_classifier
from har.jobs import predict as predict_job
from har.jobs.predict import Scoring, run_prediction
from har.models.build import build_model
from har.serving.package import log_classifier
from har.util.files import storable
from har.util.ray_cluster import Cluster
from tests.fixtures import PATH, tiny_recipe, write_images

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, of which some are none."""
    root = write_images(tmp_path_factory.mktemp("ray") / "images", per_class=30) / "train"
    (root / "Image_7.jpg").write_bytes(b"no image")
    (root / "Image_11.jpg").write_bytes(b"")
    (root / os.fsdecode(b"caf\xe9.jpg")).write_bytes((root / "Image_2.jpg").read_bytes())
    (root / "a,'\"name.jpg").write_bytes((root / "Image_1.jpg").read_bytes())
    return root


@pytest.fixture
def model(manifest: Manifest, store: str, tmp_path: Path) -> str:
    """A logged model with random weights, of a backbone that workers build too."""
    import mlflow

    recipe = tiny_recipe("v5", weights="random")
    folder = tmp_path / CLASSIFIER_FOLDER
    save_classifier(folder, build_model(recipe, 3), manifest.class_names, recipe)
    with mlflow.start_run():
        return f"models:/{log_classifier(folder)}"


def score(images: Path, out: Path, model: str, **options: Any) -> Any:
    files = {path.name: path for path in sorted(images.iterdir())}
    return run_prediction(Scoring(data=images, files=files, out=out, model=model, **options))


@pytest.mark.slow
def test_actors_give_the_rows_of_one_process(
    images: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = score(images, tmp_path / "local.csv", model)
    before = {each.pid for each in _children()}
    one = score(images, tmp_path / "ray.csv", model, cluster=Cluster(workers=2))
    said = capsys.readouterr().err
    assert one == local and one.failed == 2 and one.images == 92
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "local.csv").read_bytes()
    # nobody else than actors computed
    assert re.search(r"scored by [12] workers on 1 nodes", said)
    assert "scoring: 92 of 92" in said
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert not {each.pid for each in _children()} - before
    # a second process does not write the same file
    with pytest.raises(Exception, match="exists already"):
        score(images, tmp_path / "ray.csv", model, cluster=Cluster())


def _children() -> list[Any]:
    import psutil

    return psutil.Process().children(recursive=True)


@pytest.mark.slow
def test_a_node_that_leaves_loses_nothing(
    images: Path, model: str, tmp_path: Path, two_nodes: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Killed while it works; its images are computed again, elsewhere."""
    many = {f"{n}-{path.name}": path for n in range(40) for path in sorted(images.iterdir())}
    score_on_ray, added = predict_job.score_on_ray, []

    def score_and_kill(*arguments: Any) -> Iterator[Any]:
        for each in score_on_ray(*arguments):
            added.append(each)
            if len(added) == 300:
                node = next(n for n in two_nodes.worker_nodes)
                two_nodes.remove_node(node, allow_graceful=False)
            yield each

    monkeypatch.setattr(predict_job, "score_on_ray", score_and_kill)
    asked = Scoring(
        data=images, files=many, out=tmp_path / "out", model=model,
        cluster=Cluster(address=two_nodes.address, workers=2),
    )  # fmt: skip
    outcome = run_prediction(asked)
    said = capsys.readouterr().err
    assert "2 nodes, 2 CPUs" in said and "on 2 nodes" in said
    assert outcome.images == len(many) and outcome.failed == 80
    found = list(shards.open_shards(tmp_path / "out", list(many), _read_model(tmp_path)).read())
    assert [row["filename"] for row in found] == [storable(name) for name in many]
    by_content: dict[str, set[Any]] = {}
    for row in found:
        by_content.setdefault(row["filename"].partition("-")[2], set()).add(row["label"])
    assert all(len(labels) == 1 for labels in by_content.values())


def _read_model(tmp_path: Path) -> str:
    import json

    return str(json.loads((tmp_path / "out" / shards.TASK_FILE).read_text())["model"])


@pytest.mark.slow
def test_a_killed_command_is_resumed(images: Path, model: str, tmp_path: Path) -> None:
    """Killed between two shards; the same command computes only what is missing."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(60):
        for path in images.iterdir():
            os.link(path, many / f"{number:02}-{path.name}")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "har", "predict", "--data", str(many), "--out", str(out)]
    command += ["--model", model, "--executor", "ray"]
    environment = {**os.environ, "PATH": PATH}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 180
    while not list(out.glob("part-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert 1 <= len(there) < 6
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resuming: {len(there)} of 6 parts are there" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in there} == there
    rows = shards.open_shards(out, sorted(p.name for p in many.iterdir()), _read_model(tmp_path))
    assert rows.summarise().images == 60 * 92 and rows.summarise().failed == 120


def test_what_cannot_be_done_by_ray(images: Path, model: str, tmp_path: Path, cli: Any) -> None:
    ask = ("predict", "--data", images, "--model", model, "--out", tmp_path / "p.csv")
    assert "--workers is for --executor ray" in cli(*ask, "--workers", 2).output
    lost = cli(*ask, "--executor", "ray", "--ray-address", "127.0.0.1:1")
    assert lost.exit_code == 2 and "no Ray cluster answers at 127.0.0.1:1" in lost.output
    assert len([line for line in lost.output.splitlines() if "error" in line]) == 1
    wrong = cli(*ask, "--executor", "ray", "--ray-address", "ray://head")
    assert wrong.exit_code == 2 and "must be HOST:PORT" in wrong.output
