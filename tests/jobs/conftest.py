"""A finished training, shared by the tests of the jobs."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest

from har.data.manifest import Manifest
from har.inference.runtimes import AUTO
from har.jobs.train import run_training
from har.recipe import Recipe
from har.tracking.records import Record
from har.training.job import build_job
from tests.fixtures import tiny_backbones, tiny_recipe

FINISHED = tiny_recipe(strategy="mirrored")


def run_tiny(
    recipe: Recipe, manifest: Manifest, variant: str = "v3", runtime: str = AUTO
) -> Record:
    job = build_job(variant, recipe, ("backbone", "epochs"), manifest, runtime)
    return run_training(job, "har-tests", started=0.0)


@pytest.fixture(scope="session")
def finished(manifest: Manifest, store_uri: str) -> Record:
    """One finished run of v3, on two devices, that these tests look at."""
    mlflow.set_tracking_uri(store_uri)
    with tiny_backbones():
        return run_tiny(FINISHED, manifest)


@pytest.fixture
def run(finished: Record, store: str) -> mlflow.entities.Run:
    return mlflow.get_run(finished.run_id)


def in_a_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """As in a process of its own, of which MLflow's open run is none; and at once."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()
