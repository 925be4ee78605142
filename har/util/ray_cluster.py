"""Work on a Ray cluster, or on a small one that lives as long as the command."""

import importlib.util
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from har.util.errors import UserError, first_line
from har.util.progress import quiet_loading, say
from har.util.signals import STOPPING_SIGNALS

# Of Ray: no reports of use to its makers, no log of its C++ side on the terminal, no errors of its
# own statistics.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # else it tries an address for ten minutes
    "RAY_NUM_REDIS_GET_RETRIES": "2",
    "RAY_py_gcs_connect_timeout_s": "10",
}
ANSWER_S = 10
# How often to look whether a call has ended; how long an interrupted one may take to record that.
POLL_S, STOP_S = 1.0, 30.0
# How often a call runs again whose process or machine was lost.
CALL_RETRIES = 2
# The folder that holds this package: workers that Ray starts here import it from there too.
HOME = Path(__file__).parents[2]


class WorkerLost(UserError):
    """A process of the cluster was killed, or its machine is gone."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where --executor ray works. `address` is None for $RAY_ADDRESS, or else a cluster on this
    machine; `workers` are at work at once, None for one on each device.
    """

    address: str | None = None
    workers: int | None = None


def check_ray() -> None:
    """Raise a UserError unless Ray is installed, before any slow work."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("--executor ray needs Ray: pip install 'ray[data]>=2.60,<3'")


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address`, or at $RAY_ADDRESS; without both, start one on this
    machine. At the end, disconnect, and end what was started.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    check_ray()
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "auto":
        _check_answers(address)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    paths = [str(HOME), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    import ray

    local = {} if address else {"include_dashboard": False}
    # Ray replaces them
    handlers = {each: signal.getsignal(each) for each in STOPPING_SIGNALS}
    try:
        with quiet_loading():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _explain(address or "this machine", error) from error
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    say(f"Ray {ray.__version__}: {count_nodes()} nodes, {cpus} CPUs, {count_gpus()} GPUs")
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise a UserError unless something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(
            f"--ray-address must be HOST:PORT, the address that `ray start --head` prints; received"
            f" {address}"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S):
            pass
    except (OSError, OverflowError) as error:
        raise _explain(address, error) from error


def _explain(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address}: {first_line(error)}; start one by `ray start"
        " --head`, or leave --ray-address out"
    )


def count_nodes() -> int:
    """Return the number of machines in the connected cluster."""
    import ray

    return sum(each["Alive"] for each in ray.nodes())


def count_gpus() -> int:
    """Return the number of GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def count_hosts() -> int:
    """Return the number of different machines in the connected cluster."""
    import ray

    return len({each["NodeManagerHostname"] for each in ray.nodes() if each["Alive"]})


def count_devices(cluster: Cluster) -> int:
    """Return how many calls of the connected cluster run at once: by default one on each GPU, or
    else one on each machine.
    """
    return cluster.workers or count_gpus() or count_nodes()


def take_result(called: Any) -> Any:
    """Return what a call on the cluster returned, or raise what it raised; what cannot travel
    comes as an error of Ray that quotes it.

    Raises:
        UserError: the call raised one.
        WorkerLost: it did not end.
    """
    import ray
    from ray import exceptions

    lost = (
        exceptions.RayActorError,
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
    )
    try:
        return ray.get(called)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    except lost as error:
        raise WorkerLost(f"a worker of the cluster was lost: {first_line(error)}") from error


def _reserve_device(cluster: Cluster) -> dict[str, float]:
    """Return what a call reserves: a GPU where there are any, else an equal share of the CPUs."""
    import ray

    if count_gpus():
        return {"num_gpus": 1}
    cpus = int(ray.cluster_resources().get("CPU", 1))
    return {"num_cpus": max(1, cpus // count_devices(cluster))}


def call_on_devices(
    cluster: Cluster,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    on_poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Any]]:
    """Call a function once for each tuple of arguments, one call on a device at a time; yield the
    number of each call and what it returned, as they end. Call it while connected. `on_poll` is
    called every second meanwhile.

    A call whose machine is lost runs again. After an error, calls that run may end, none starts.

    Raises:
        UserError: the function raised one, or a call lost its process again and again.
    """
    import ray

    # each call in a new process, as one command after the other
    remote = ray.remote(max_calls=1, max_retries=CALL_RETRIES)(function).options(
        scheduling_strategy="SPREAD", **_reserve_device(cluster)
    )
    most = count_devices(cluster)
    to_do = list(enumerate(calls))[::-1]
    working: dict[Any, int] = {}
    failed: UserError | None = None
    try:
        while working or (to_do and failed is None):
            while to_do and failed is None and len(working) < most:
                number, arguments = to_do.pop()
                working[remote.remote(*arguments)] = number
            ready, _ = ray.wait(list(working), timeout=POLL_S)
            on_poll()
            for each in ready:
                number = working.pop(each)
                try:
                    found = take_result(each)
                except UserError as error:
                    failed = failed or error
                else:
                    yield number, found
    except (KeyboardInterrupt, GeneratorExit):
        _cancel(list(working))
        raise
    if failed is not None:
        raise failed


def _cancel(calls: list[Any]) -> None:
    """Interrupt calls, and give them time to record that."""
    import ray

    for each in calls:
        ray.cancel(each)
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=STOP_S)
