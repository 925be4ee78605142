"""Measure `har predict` on this machine and on Ray, beside what it cannot do without.

    python benchmarks/scaling.py --data DIR

`har run` trains v5 for one epoch. Then these take turns on 6,000 images, repeated where DIR has
fewer: a bare loop that decodes in threads and computes; `har predict` on this machine; and a Ray
cluster on this machine, started for it, with one and with two workers; and, where pyspark and Java
are installed, Spark as docs/scaling.md has it. Start-up is measured apart:
of the command, until its first row; of Ray, until the first row of its workers.

From that, and from what one process does for each row of a cluster, a second table says what larger
numbers of images would take, on machines of 16 such cores at a stated price.
"""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import measuring
from har.data.prepare import load_manifest
from har.util.hardware import available_cpus
from har.util.process import set_variables
from measuring import Claim, Tables

IMAGES, TURNS = 6_000, 3
BATCH = 32
RATE = "images/s"
# Of the model of costs: an assumption, and a round number to scale from.
DOLLARS_PER_CORE_HOUR, CORES = 0.05, 16
# Rows that the process in charge takes from workers and writes, to measure it.
TAKEN_ROWS = 100_000
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


def _has_spark() -> bool:
    return bool(shutil.which("java") and importlib.util.find_spec("pyspark"))


def _measure_spark(uri: str, paths: list[Path]) -> dict[str, float]:
    """Classify as docs/scaling.md does, by two tasks at once; a few images first, for start-up."""
    import mlflow
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import col, struct

    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    started = time.monotonic()
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", 256)
        .getOrCreate()
    )
    result = "label string, probability double, error string"
    classify = mlflow.pyfunc.spark_udf(spark, uri, result_type=result, env_manager="local")
    files = spark.read.format("binaryFile").load(str(paths[0].parent)).repartition(8)
    labels = files.select(classify(struct(col("content").alias("image"))).alias("found"))
    # both workers load the model for these
    assert labels.limit(8).collect()
    first = time.monotonic()
    rows = labels.select("found.label").collect()
    seconds = time.monotonic() - first
    spark.stop()
    assert len(rows) == len(paths) and all(row.label for row in rows)
    return {RATE: len(paths) / seconds, "start-up, s": first - started}


def _measure_driver(folder: Path, rows: int) -> dict[str, float]:
    """Measure what the process in charge does: names in memory, and rows into shards."""
    from har.inference.classifier import Prediction
    from har.inference.shards import open_shards

    process = psutil.Process()
    before = process.memory_info().rss
    names = [f"photos/{number % 1000:03}/image-{number:012}.jpg" for number in range(rows)]
    files = {name: folder / name for name in names}
    memory = process.memory_info().rss - before
    shards = open_shards(folder / "out", names, "a model")
    row: Prediction = {"label": "sitting", "probability": 0.5, "top_3": [], "error": None}
    started = time.monotonic()
    for number in range(rows):
        shards.add(number, row)
    seconds = time.monotonic() - started
    size = sum(each.stat().st_size for each in (folder / "out").iterdir())
    assert len(files) == rows and not shards.missing
    return {
        "rows/s": rows / seconds,
        "bytes a row": size / rows,
        "MB for a million names": memory / rows,
    }


def _estimate_costs(turns: measuring.Turns, driver: dict[str, float], kb: float) -> list[Any]:
    """Scale the measured rates: hours on some machines, and what sets them."""
    medians = {row["name"]: row for row in measuring.summarise(turns)}
    rate_per_core = medians["Ray, 2 workers"][RATE] / available_cpus()
    start_h = medians["Ray, 2 workers"]["start-up, s"] / 3600
    rows = []
    for images, machines in ((10**6, 1), (10**7, 1), (10**8, 10), (10**9, 100)):
        workers = images / (rate_per_core * CORES * machines) / 3600
        taking = images / driver["rows/s"] / 3600
        rows.append(
            {
                "name": f"{images:,}",
                "machines": machines,
                "hours": start_h + max(workers, taking),
                "set by": "workers" if workers > taking else "the process in charge",
                "$ a million": 1e6 / rate_per_core / 3600 * DOLLARS_PER_CORE_HOUR,
                "read, GB": images * kb / 1e6,
                "names, GB": images * driver["MB for a million names"] / 1e9,
            }
        )
    return rows


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
    if _has_spark():
        calls["Spark, 2 tasks"] = (_measure_spark, uri, paths)
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
    driver = measuring.in_fresh_process(_measure_driver, scratch, 5_000 if tiny else TAKEN_ROWS)
    kb = sum(path.stat().st_size for path in paths) / len(paths) / 1000
    tables = {
        "way": measuring.summarise(turns),
        "the process in charge": [{"name": "measured", **driver, "kB an image": kb}],
        "images": _estimate_costs(turns, driver, kb),
    }
    return tables, [] if tiny else bars


def _predict_one(path: Path, scratch: Path, uri: str, number: int) -> None:
    folder = scratch / "one"
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    out = str(scratch / f"one{number}.csv")
    words = ("predict", "--data", str(folder), "--model", uri, "--out", out)
    measuring.har(*words, folder=scratch / "store")


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
