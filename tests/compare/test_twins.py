"""Twins across hardware: who is one, what is said of them, and who writes it."""

import re
from collections.abc import Iterator
from dataclasses import replace

import mlflow
import numpy as np
import pytest
import tensorflow as tf
from mlflow import MlflowClient

from har.compare.twins import (
    compare_twins,
    find_twins,
    format_comparisons,
    name_tag,
)
from har.data.manifest import Manifest
from har.jobs.import_notebooks import import_notebooks
from har.jobs.train import run_training
from har.models.devices import STRATEGIES
from har.training.job import build_job
from tests.compare.conftest import HERE
from tests.fixtures import tiny_recipe

THERE = replace(
    HERE,
    run_id="there",
    hardware="2xT4",
    seconds=100.0,
    images_per_second=150.0,
    test_metrics={"accuracy": 0.75},
)


NOTEBOOK = replace(
    HERE, run_id="n", published=True, digests=("", "", ""), seconds=1320.0, images_per_second=None
)


def test_twins_share_recipe_data_and_test_images_on_other_hardware() -> None:
    others = [
        HERE,
        replace(HERE, run_id="repeat"),
        THERE,
        replace(THERE, run_id="newer", started=3),
        replace(THERE, run_id="other recipe", started=4, digests=("x", "d", "t")),
        replace(THERE, run_id="other data", started=4, digests=("r", "x", "t")),
        replace(THERE, run_id="other test", started=4, digests=("r", "d", "x")),
        replace(THERE, run_id="cpu", hardware="1xCPU"),
        NOTEBOOK,
        replace(NOTEBOOK, run_id="of v2", variant="v2"),
    ]
    assert [each.run_id for each in find_twins(HERE, others)] == ["cpu", "newer", "n"]
    assert find_twins(HERE, [HERE]) == []


def test_a_comparison_has_ratios_and_the_paired_difference() -> None:
    here, there = np.array([1, 1, 0, 0], bool), np.array([1, 1, 1, 0], bool)
    found = compare_twins(HERE, THERE, here, there)
    assert (found.time_ratio, found.speed_ratio) == (0.5, 1.5)
    assert found.difference is not None and found.difference[0] == 0.25
    table = format_comparisons(HERE, [found])
    assert "2xT4" in table and "0.50" in table and "+25.0 (" in table


def test_what_is_not_known_is_a_dash() -> None:
    unknown = replace(HERE, images_per_second=None)
    found = compare_twins(unknown, replace(NOTEBOOK, seconds=None))
    assert (found.time_ratio, found.speed_ratio, found.difference) == (None, None, None)
    assert "1xP100 (published)" in format_comparisons(HERE, [found])
    assert "no twins" in format_comparisons(HERE, [])
    warm = replace(THERE, cache_hit=True)
    assert "2xT4 (cache hit)" in format_comparisons(HERE, [compare_twins(HERE, warm)])
    # its wall time is not the whole job's, on whichever side it stands
    assert compare_twins(HERE, warm).time_ratio is compare_twins(warm, HERE).time_ratio is None


def test_tags_are_those_that_mlflow_takes(store: str) -> None:
    with mlflow.start_run(experiment_id="0"):
        mlflow.set_tag(name_tag(replace(THERE, hardware="1xP100+1xT4")), "x")
    assert name_tag(NOTEBOOK) == "twin.notebook"


@pytest.fixture
def two_runs(
    manifest: Manifest, store: str, tiny_backbone: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """Trained as v3 on two devices, then on one of them; v6's head takes the least time."""
    found, recipe = [], tiny_recipe("v6", strategy="mirrored")
    one = tf.distribute.MirroredStrategy([tf.config.list_logical_devices("CPU")[0].name])
    for strategy in (STRATEGIES["mirrored"], lambda: one):
        monkeypatch.setitem(STRATEGIES, "mirrored", strategy)
        job = build_job("v3", recipe, ("backbone",), manifest)
        found.append(run_training(job, "twins", started=0.0).run_id)
    yield found
    for run_id in found:
        MlflowClient().delete_run(run_id)


def test_two_trainings_find_each_other(two_runs: list[str], cli) -> None:
    both, one = (mlflow.get_run(run_id) for run_id in two_runs)
    assert both.data.tags["twin.1xCPU"] == one.info.run_id
    assert one.data.tags["twin.2xCPU"] == both.info.run_id
    published = import_notebooks("twins")["v3"]
    result = cli("twins", two_runs[0])
    assert result.exit_code == 0
    assert "1xCPU" in result.output and "1xP100 (published)" in result.output
    # both were evaluated on the same images
    assert re.search(r"[+-]\d+\.\d \(", result.output)
    assert MlflowClient().get_run(two_runs[0]).data.tags["twin.notebook"] == published

    # deleted twins are forgotten
    MlflowClient().delete_run(two_runs[1])
    assert "1xCPU" not in cli("twins", two_runs[0]).output
    tags = MlflowClient().get_run(two_runs[0]).data.tags
    assert "twin.1xCPU" not in tags
    MlflowClient().restore_run(two_runs[1])


@pytest.mark.parametrize("status", ["missing", "RUNNING", "untrained"])
def test_no_finished_training(status: str, store: str, cli) -> None:
    run_id = "0" * 32
    if status != "missing":
        run_id = MlflowClient().create_run("0").info.run_id
    if status == "untrained":
        MlflowClient().set_terminated(run_id)
    result = cli("twins", run_id)
    assert result.exit_code == 2 and run_id in result.output
