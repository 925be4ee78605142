"""Measure `har predict` on this machine and on Ray, beside what it cannot do without.

    python benchmarks/scaling.py --data DIR

`har run` trains v5 for one epoch. Then these take turns on 6,000 images, repeated where DIR has
fewer: a bare loop that decodes in threads and computes; `har predict` on this machine; and a Ray
cluster on this machine, started for it, with one and with two workers. Start-up is measured apart:
of the command, until its first row; of Ray, until the first row of its workers.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measuring
from har.data.prepare import load_manifest
from har.util.process import set_variables
from measuring import Claim, Tables

IMAGES, TURNS = 6_000, 3
BATCH = 32
RATE = "images/s"
LITE = ("--backbone", "efficientnet-lite0", "--epochs", "1")


def _measure_bare(uri: str, paths: list[Path]) -> dict[str, float]:
    """Decode in threads, ahead of what is computed, and compute."""
    import internals

    decode, forward = internals.load_bare(uri)

    def read(batch: list[Path]) -> Any:
        return decode([path.read_bytes() for path in batch])

    batches = [paths[n : n + BATCH] for n in range(0, len(paths), BATCH)]
    forward(read(batches[0]))
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        for images in pool.map(read, batches):
            forward(images)
    return {RATE: len(paths) / (time.monotonic() - started)}


def _time_rows(rows: Iterable[Any], count: int) -> dict[str, float]:
    """Measure the seconds to the first row, and the rate from there."""
    started = time.monotonic()
    iterator = iter(rows)
    next(iterator)
    first = time.monotonic()
    for _ in iterator:
        pass
    return {RATE: count / (time.monotonic() - first), "start-up, s": first - started}


def _measure_local(uri: str, paths: list[Path]) -> dict[str, float]:
    from har.inference.predict import AHEAD, classify_files
    from har.serving.load import load_logged_model

    def rows() -> Iterator[Any]:
        classify = load_logged_model(uri).classifier.classify
        return classify_files(paths, classify, AHEAD)

    started = time.monotonic()
    found = rows()
    loaded = time.monotonic() - started
    measured = _time_rows(found, len(paths))
    return measured | {"start-up, s": measured["start-up, s"] + loaded}


def _measure_ray(uri: str, paths: list[Path], workers: int) -> dict[str, float]:
    import psutil

    from har.inference.ray_scoring import score_on_ray
    from har.serving.load import open_classifier
    from har.util.ray_cluster import connect

    with open_classifier(uri) as (folder, _), _time_connection(connect) as connected:
        rows = score_on_ray(paths, range(len(paths)), folder, workers)
        found = _time_rows(rows, len(paths))
        actors = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in p.name()]
        memory = max((p.memory_info().rss for p in actors), default=0) / 1e6
    return found | {"start-up, s": found["start-up, s"] + connected[0], "worker, MB": memory}


@contextmanager
def _time_connection(connect: Callable[..., Any]) -> Iterator[list[float]]:
    started = time.monotonic()
    with connect(None):
        yield [time.monotonic() - started]


def _in_new_process(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: measuring.in_fresh_process(function, *arguments)


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Train, then measure each way in turn."""
    manifest = load_manifest(data)
    run = measuring.har_run("v5", data, scratch / "store", *LITE)
    folder = measuring.repeat_images(manifest, 64 if tiny else IMAGES, scratch / "images")
    paths = sorted((folder / "train").iterdir())
    environment = measuring.store_in(scratch / "store")
    uri = f"runs:/{run['run_id']}/model"
    calls = {
        "bare loop": (_measure_bare, uri, paths),
        "har predict": (_measure_local, uri, paths),
        "Ray, 1 worker": (_measure_ray, uri, paths, 1),
        "Ray, 2 workers": (_measure_ray, uri, paths, 2),
    }
    with set_variables(environment):
        started = {name: _in_new_process(*call) for name, call in calls.items()}
        turns = measuring.take_turns(started, 1 if tiny else TURNS)
    command_s = [
        measuring.timed(lambda n=n: _predict_one(paths[0], scratch, uri, n)) for n in range(3)
    ]
    bars = [
        Claim(
            "har predict / bare loop",
            measuring.median_ratio(turns, RATE, "har predict", "bare loop"), ">=", 0.9,
        ),
        Claim(
            "Ray, 2 workers / har predict",
            measuring.median_ratio(turns, RATE, "Ray, 2 workers", "har predict"), ">=", 0.8,
        ),
        Claim("the whole command for one image, s", sorted(command_s)[1], "<=", 6),
    ]  # fmt: skip
    return {"way": measuring.summarise(turns)}, [] if tiny else bars


def _predict_one(path: Path, scratch: Path, uri: str, number: int) -> None:
    folder = scratch / "one"
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    out = str(scratch / f"one{number}.csv")
    words = ("predict", "--data", str(folder), "--model", uri, "--out", out)
    measuring.har(*words, folder=scratch / "store")


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
