"""`--executor ray` of the commands that train: features and trainings of one machine, by others."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
import pytest

from har.data.layouts import folder_source
from har.data.manifest import Manifest
from har.data.prepare import prepare
from har.data.splits import Split
from har.jobs import children, trials
from har.training import ray_features
from har.training.features import Extraction, View, training_views
from har.training.ray_features import RayExtraction
from har.util.errors import UserError
from har.util.ray_cluster import Cluster, call_on_devices, connect
from tests.fixtures import build_tiny, tiny_recipe, write_images

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]'")
pytestmark = pytest.mark.slow

SMALL = (
    "--backbone", "efficientnet-lite0", "--image-size", "32", "--batch-size", "4", "--weights",
    "random", "--precision", "float32", "--strategy", "one_device", "--runtime", "tensorflow",
)  # fmt: skip


@pytest.fixture(scope="module")
def ninety(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("ninety")
    root = write_images(folder / "images", per_class=30)
    return prepare(folder_source(root, why="a test"), folder / "out", Split(test_fraction=0))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_features, "PART_ROWS", 32)


def open_on_ray(opened: ExitStack, *asked: Any, **cluster: Any) -> RayExtraction:
    return RayExtraction(*asked, cluster=Cluster(**cluster), opened=opened)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("runtime", ["tensorflow", "openvino"])
def test_workers_compute_the_same_features(
    ninety: Manifest, network: keras.Model, runtime: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = ninety.rows("train")
    recipe = tiny_recipe("v7", augmentation="crop_flip_color", feature_views=2)
    views = training_views(recipe)
    local = Extraction(network, ninety, recipe, runtime).all_views(rows, views)
    monkeypatch.setenv("HAR_CACHE", str(tmp_path))
    with ExitStack() as opened:
        found = open_on_ray(opened, network, ninety, recipe, runtime, "", workers=2)
        assert np.array_equal(found.all_views(rows, views), local)
        mirrored = found.features(rows, View(size=32, augmentation="mirror", number=1), exact=True)
        # this process has computed nothing
        assert not found.compiled and not found.converted
        assert found.computed == found.needed == 3 * len(rows) and found.lost == 0
    assert not ray.is_initialized()
    # this machine's cache has them
    again = Extraction(network, ninety, recipe, runtime)
    assert np.array_equal(again.all_views(rows, views), local) and not again.computed
    exact = Extraction(network, ninety, recipe, runtime)
    view = View(size=32, augmentation="mirror", number=1)
    assert np.array_equal(exact.features(rows, view, exact=True), mirrored)


@pytest.mark.usefixtures("small_parts", "tiny_backbone")
def test_features_before_a_cut(ninety: Manifest, tmp_path: Path, monkeypatch: Any) -> None:
    rows, model = ninety.rows("train"), build_tiny(32)
    before = keras.Model(model.input, model.layers[-2].output)
    recipe = tiny_recipe("v7")
    local = Extraction(before, ninety, recipe, "tensorflow", "block").features(rows)
    monkeypatch.setenv("HAR_CACHE", str(tmp_path))
    with ExitStack() as opened:
        found = open_on_ray(opened, before, ninety, recipe, "tensorflow", "block", workers=1)
        assert np.array_equal(found.features(rows), local) and local.dtype == np.float16


@pytest.mark.usefixtures("small_parts")
def test_a_node_that_leaves_loses_no_features(
    ninety: Manifest, network: keras.Model, two_nodes: Any, tmp_path: Path, monkeypatch: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    many = replace(ninety, table=ninety.table.loc[ninety.table.index.repeat(20)])
    rows, recipe = many.rows("train"), tiny_recipe("v7")
    local = Extraction(network, many, recipe, "tensorflow").features(rows)
    monkeypatch.setenv("HAR_CACHE", str(tmp_path))
    share_out, pieces = RayExtraction._share_out, []

    def share_and_kill(*arguments: Any) -> Iterator[Any]:
        for each in share_out(*arguments):
            pieces.append(each)
            if len(pieces) == 5:
                node = next(iter(two_nodes.worker_nodes))
                two_nodes.remove_node(node, allow_graceful=False)
            yield each

    monkeypatch.setattr(RayExtraction, "_share_out", share_and_kill)
    with ExitStack() as opened:
        asked = network, many, recipe, "tensorflow", ""
        found = open_on_ray(opened, *asked, address=two_nodes.address)
        assert np.array_equal(found.features(rows), local)
        assert found.lost == 1
    said = capsys.readouterr().err
    assert "2 nodes" in said and "a worker of the cluster was lost" in said
    # nothing twice
    assert len(pieces) == -(-len(rows) // 32) and found.computed == len(rows)


@pytest.mark.usefixtures("small_parts")
def test_what_workers_refuse(raw: Path, network: keras.Model, tmp_path: Path) -> None:
    manifest = prepare(folder_source(raw, why="a test"), tmp_path / "out", Split(test_fraction=0))
    rows = manifest.rows("train")
    asked = network, manifest, tiny_recipe("v7"), "tensorflow", ""
    path = manifest.root / rows["path"].iloc[3]
    shutil.copy(manifest.root / rows["path"].iloc[9], path)
    with ExitStack() as opened, pytest.raises(UserError, match=path.name):
        open_on_ray(opened, *asked, workers=1).features(rows)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as opened:
        describe = ray_features.describe_arithmetic
        patch.setattr(ray_features, "describe_arithmetic", lambda it: describe(it) + ".1")
        with pytest.raises(UserError, match="they would differ"):
            open_on_ray(opened, *asked, workers=1).features(rows)


def test_a_training_whose_features_come_from_ray(
    tiny_raw: Path, store: str, cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask = ("run", "--variant", "v6", *SMALL, "--data", tiny_raw, "--experiment", "ray")
    for options in ((), ("--executor", "ray", "--workers", "2")):
        monkeypatch.setenv("HAR_CACHE", str(tmp_path / f"cache{len(options)}"))
        result = cli(*ask, *options)
        assert result.exit_code == 0, result.output
    assert "starting 2 workers" in result.output
    ids = [mlflow.get_experiment_by_name("ray").experiment_id]
    on_ray, local = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    assert on_ray.data.params["executor"] == "ray" and "executor" not in local.data.params
    for name in ("accuracy", "log_loss", "val_loss"):
        assert on_ray.data.metrics[name] == local.data.metrics[name]
    assert on_ray.data.tags["feature_cache"] == local.data.tags["feature_cache"] == "miss"
    refused = cli("run", "--variant", "v3", "--data", tiny_raw, "--executor", "ray")
    assert refused.exit_code == 2 and "--loader" in refused.output


def fail(*arguments: Any) -> None:
    raise AssertionError("this process must train nothing")


def test_a_search_on_ray(
    tiny_raw: Path, store: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker takes part in the search, and the best recipe is trained once."""
    # workers import these modules anew
    monkeypatch.setattr(trials, "_run_trials", fail)
    monkeypatch.setattr(children, "run_training", fail)
    ask = (
        "sweep", "--variant", "v5", "--epochs", "2", *SMALL, "--data", tiny_raw, "--param",
        "learning_rate=log:1e-4:1e-1", "--trials", "6", "--experiment", "swept on ray",
        "--executor", "ray", "--workers", "2",
    )  # fmt: skip
    result = cli(*ask)
    assert result.exit_code == 0, result.output
    ids = [mlflow.get_experiment_by_name("swept on ray").experiment_id]
    tried = mlflow.search_runs(ids, "tags.job = 'trial'", output_format="list")
    assert len(tried) == 6
    assert not any("accuracy" in each.data.metrics for each in tried)
    (winner,) = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    assert winner.info.status == "FINISHED" and "accuracy" in winner.data.metrics
    told = [line for line in result.output.splitlines() if " of 6: " in line]
    assert len(told) == 6 and "trial 6 of 6: " in result.output
    again = cli(*ask)
    assert again.exit_code == 0, again.output
    assert len(mlflow.search_runs(ids, "tags.job = 'trial'", output_format="list")) == 6


def test_an_ablation_on_ray(
    tiny_raw: Path, store: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "run_training", fail)
    ask = (
        "ablate", "--from", "v5", "--to", "v6", "--chain-only", "--group",
        "augmentation,feature_views,head,test_time,calibration", "--epochs", "1", *SMALL, "--data",
        tiny_raw, "--experiment", "ablated on ray", "--executor", "ray",
    )  # fmt: skip
    result = cli(*ask)
    assert result.exit_code == 0, result.output
    ids = [mlflow.get_experiment_by_name("ablated on ray").experiment_id]
    runs = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    assert len(runs) >= 2 and all(each.info.status == "FINISHED" for each in runs)
    assert f"{len(runs)} of {len(runs)} recipes are trained" in result.output
    again = cli(*ask)
    assert again.exit_code == 0
    assert len(mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")) == len(runs)


def end_once(marker: str, number: int) -> int:
    """Lose the process of the first call that comes here."""
    if number == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def refuse(number: int) -> int:
    if number == 1:
        raise UserError(f"not {number}")
    return number


def divide(number: int) -> float:
    return 1 / number


def test_calls_on_devices(tmp_path: Path) -> None:
    """A lost process is replaced; a user's mistake and a bug are what they were."""
    with connect(None):
        cluster, marker = Cluster(workers=2), str(tmp_path / "ended")
        found = call_on_devices(cluster, end_once, [(marker, n) for n in range(4)])
        assert sorted(found) == [(n, n * n) for n in range(4)] and Path(marker).exists()
        with pytest.raises(UserError, match=r"^not 1$"):
            list(call_on_devices(cluster, refuse, [(n,) for n in (1, 2, 3)]))
        with pytest.raises(ZeroDivisionError):
            list(call_on_devices(cluster, divide, [(0,)]))


def test_a_bug_of_a_worker_is_no_lost_worker(
    ninety: Manifest, network: keras.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = network, ninety, tiny_recipe("v7"), "tensorflow", ""
    with ExitStack() as opened:
        found = open_on_ray(opened, *asked, workers=1)
        view = View(size=32, augmentation="no such", number=1)
        with pytest.raises(Exception, match="KeyError") as caught:
            found.features(ninety.table, view)
        assert not isinstance(caught.value, UserError)
        assert found.lost == 0
