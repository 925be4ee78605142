"""Measure what a search of many trials asks of the tracking store.

    python benchmarks/tracking_load.py --data DIR

The records of 1,000 trials of v6, with the metrics of ten epochs, are written by the code of `har
sweep` from 8 threads at once, and those of 100 from one, without the trainings between them: the
load of as many workers whose trials take no time. The stores are a file of SQLite, and a tracking
server on SQLite and, where it is installed, on PostgreSQL. Afterwards the trials are read as `har
sweep` reads them. The images of DIR are not read.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import measuring
import services
from har.data.prepare import load_manifest
from har.util.process import set_variables
from measuring import Claim, Tables

EPOCHS = 10
# Trials by the threads that write them.
TRIALS = {1: 100, 8: 1_000}


def _write_trial(parent: str, job: Any, number: int) -> float:
    """Record a trial; return the seconds that its training would have waited for the store."""
    from har.tracking.trials import COMPLETE, start_trial

    started = time.monotonic()
    run = start_trial(parent, "load", number, {"learning_rate": 1 / (number + 1)}, job)
    with run.open_epoch_log() as log:
        for epoch in range(1, EPOCHS + 1):
            metrics = {f"{split}_{name}": 0.5 for split in ("train", "val") for name in ("loss",
                       "accuracy", "top_3_accuracy")}  # fmt: skip
            log(epoch, metrics | {"epoch_time_s": 1.0, "images_per_second": 1.0})
    run.end(COMPLETE)
    return time.monotonic() - started


def _measure_load(data: str, trials: int, threads: int) -> dict[str, float]:
    """Write and read `trials` trials in the store that the environment names."""
    import mlflow

    from har.recipe import VARIANTS
    from har.tracking.query import find_runs
    from har.training.job import build_job

    job = build_job("v6", VARIANTS["v6"], (), load_manifest(data), quiet=True)
    experiment = mlflow.create_experiment(f"load by {threads}")
    with mlflow.start_run(experiment_id=experiment) as run:
        parent = run.info.run_id
    started = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        waited = list(pool.map(lambda n: _write_trial(parent, job, n), range(trials)))
    written = time.monotonic() - started
    started = time.monotonic()
    found = find_runs("tags.job = 'trial'", [experiment])
    read = time.monotonic() - started
    assert len(found) == trials and all(r.info.status == "FINISHED" for r in found)
    assert all(r.data.metrics["val_loss"] == 0.5 for r in found)
    return {
        "trials/s": trials / written,
        "a trial waits, s": sorted(waited)[len(waited) // 2],
        "slowest, s": max(waited),
        "all read again, s": read,
    }


@contextmanager
def _serve(backend: str, folder: Path) -> Iterator[str]:
    port = measuring.free_port()
    words = ("server", "--backend-store-uri", backend, "--artifacts-destination", str(folder))
    process = measuring.start_server((*words, "--port", str(port)), port, folder)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        measuring.stop_server(process)


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure each store with each number of threads."""
    rows = []
    with ExitStack() as opened:
        (scratch / "sqlite").mkdir()
        on_sqlite = f"sqlite:///{scratch}/sqlite/server.db"
        stores = {
            "a file of SQLite": f"sqlite:///{scratch}/mlflow.db",
            "a server on SQLite": opened.enter_context(_serve(on_sqlite, scratch / "sqlite")),
        }
        if services.find_postgres() and not tiny:
            backend = opened.enter_context(services.running_postgres()).create("mlflow")
            (scratch / "postgres").mkdir()
            server = opened.enter_context(_serve(backend, scratch / "postgres"))
            stores["a server on PostgreSQL"] = server
        for name, uri in stores.items():
            for threads, trials in TRIALS.items():
                with set_variables({"MLFLOW_TRACKING_URI": uri}):
                    count = 8 if tiny else trials
                    found = measuring.in_fresh_process(_measure_load, data, count, threads)
                rows.append({"name": f"{name}, {threads} at once", **found})
    return {"store": rows}, []


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
