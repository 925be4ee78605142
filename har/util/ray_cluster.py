"""A connection to a Ray cluster, or to a small one that lives as long as the command."""

import importlib.util
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
# The folder that holds this package: workers that Ray starts here import it from there too.
HOME = Path(__file__).parents[2]


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
