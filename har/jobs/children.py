"""Trainings recorded under a parent run, for the jobs that train many recipes: ablate and sweep."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import mlflow
import psutil

from har.data.manifest import Manifest
from har.jobs.train import run_training
from har.recipe import Recipe
from har.tracking.query import find_experiment, find_runs
from har.training.job import TrainingJob, build_job
from har.util.errors import UserError
from har.util.process import process_start, set_variables
from har.util.ray_cluster import Cluster, call_on_devices, connect, count_hosts
from har.util.signals import ignore_ctrl_c, stop_on_signals

Returned = TypeVar("Returned")


class KilledFromOutside(UserError):
    """The operating system, or a user, killed a training's process."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What equal trainings have in common: their tags, by name."""

    recipe_digest: str
    hardware: str
    dataset_digest: str
    test_digest: str


@dataclass(frozen=True, kw_only=True)
class Child:
    """A training to record under the run `parent`; the user set the recipe fields `overridden`."""

    variant: str
    recipe: Recipe
    overridden: tuple[str, ...]
    manifest: Manifest
    runtime: str
    experiment: str
    parent: str


def build_key(job: TrainingJob) -> Key:
    """Return what trainings that equal this one have in common."""
    return Key(
        recipe_digest=job.recipe_digest,
        hardware=job.hardware_tag,
        dataset_digest=job.manifest.dataset_digest,
        test_digest=job.manifest.test_digest,
    )


def find_finished(key: Key, runtime: str, experiment: str, **tags: str) -> list[Any]:
    """Find the finished runs of equal trainings that also have these tags, newest first."""
    wanted = {
        **{f"tags.{name}": value for name, value in (asdict(key) | tags).items()},
        "params.runtime": runtime,
        "attributes.status": "FINISHED",
    }
    condition = " and ".join(f"{name} = '{value}'" for name, value in wanted.items())
    return find_runs(condition, [find_experiment(experiment)])


def train_child(child: Child, cache: str | None = None) -> str:
    """Train, evaluate and record; return the run's id. Features are cached in the folder `cache`.

    Call it in its own process: no run of MLflow may be open.
    """
    started = process_start()
    if cache is not None:
        os.environ["HAR_CACHE"] = cache
    job = build_job(child.variant, child.recipe, child.overridden, child.manifest, child.runtime)
    return run_training(job, child.experiment, started, parent=child.parent).run_id


def in_own_process(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Call the function in a new Python process, which writes into the same store."""
    with (
        set_variables({"MLFLOW_TRACKING_URI": mlflow.get_tracking_uri()}),
        ProcessPoolExecutor(
            max_workers=1, mp_context=get_context("spawn"), initializer=stop_on_signals
        ) as pool,
    ):
        # a child that is still importing would answer Ctrl-C with a stack trace
        with ignore_ctrl_c():
            working = pool.submit(function, *arguments)
        try:
            return working.result()
        except BrokenProcessPool as error:
            message = "a training was killed from outside; was memory short?"
            raise KilledFromOutside(message) from error
        except KeyboardInterrupt:
            # the children ignore Ctrl-C, and take SIGTERM as such
            for child in psutil.Process().children():
                child.terminate()
            raise


@contextmanager
def open_cluster(cluster: Cluster | None, *stores: str) -> Iterator[None]:
    """Connect to a cluster, if there is one, whose machines must reach these databases.

    Raises:
        UserError: the cluster does not answer, or has several machines and a store is a file.
    """
    if cluster is None:
        yield
        return
    with connect(cluster.address):
        for store in stores:
            if count_hosts() > 1 and not store.startswith(("http", "postgresql", "mysql", "mssql")):
                raise UserError(
                    f"the other machines of the cluster do not reach {store}: set"
                    " MLFLOW_TRACKING_URI to a server, and --storage of har sweep to a database"
                    " such as postgresql://..."
                )
        yield


def call_on_cluster(
    cluster: Cluster,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    on_poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Any]]:
    """Call as `call_on_devices` does; the calls write into this process' store."""
    here = os.getcwd(), mlflow.get_tracking_uri()
    remote = [(*here, function, *each) for each in calls]
    return call_on_devices(cluster, _call_here, remote, on_poll)


def _call_here(folder: str, uri: str, function: Callable[..., Any], *arguments: Any) -> Any:
    # a store may be a file that is named from there
    with suppress(OSError):
        os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    return function(*arguments)
