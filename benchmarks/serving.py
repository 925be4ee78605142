"""How fast the served model answers, beside what it cannot do without.

    python benchmarks/serving.py --data DIR

Everything runs in this one command, on images of DIR (a folder that `har run --data` takes):

- a model is trained for one epoch and logged four ways: for our runtimes tensorflow and openvino,
  as a pyfunc that reads nothing and answers the same row to every image, and in MLflow's stock
  TensorFlow flavour;
- bare: decoding and the forward pass alone, in a process without a server, as one calls them by
  hand with the same threads;
- each model is served by the real `mlflow models serve` and asked over loopback from this process,
  which knows no TensorFlow, by 1, 4 and 16 clients at once with 1 and 32 images a request. The
  stock flavour, which has no decoder, gets decoded pixels as JSON;
- for what is compared, bare calls and servers take turns; a figure is the median of the turns;
- cold start: from the command to the first answer.

Prints tables, writes JSON, and exits with 1 if one of the bars is missed.
"""

import base64
import functools
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from har.data.manifest import Manifest
from har.recipe import VARIANTS
from har.util.progress import say
from measuring import (
    RESULTS,
    Bar,
    bar_lines,
    find_machine,
    finish,
    in_fresh_process,
    load_images,
    load_tensorflow,
)

RECIPE = replace(VARIANTS["v3"], backbone="efficientnet-lite0", epochs=1)
BATCH = 32
CLIENTS = (1, 4, 16)
# Of one cell of the table: enough for a 95th percentile, and bounded.
REQUESTS = {1: 360, BATCH: 36}
# Of each server and each bare runtime, in one turn of the comparison.
REQUESTS_A_TURN = {1: 40, BATCH: 4}
COLD_STARTS = 3
START_TIMEOUT_S = 180
AGREEMENT_IMAGES = 2000

OVERHEAD_MS = 3.0
BATCH_TO_BARE = 0.8
BATCH_TO_STOCK = 10.0
OPENVINO_TO_TENSORFLOW = 1.3
AGREEMENT = 0.995

Body = tuple[bytes, str]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Requests of `batch` images from `clients` at once. Seconds of each, and of all."""

    server: str
    clients: int
    batch: int
    seconds: list[float]
    total_s: float

    @property
    def images_per_second(self) -> float:
        """Of all clients together."""
        return len(self.seconds) * self.batch / self.total_s

    def percentile_ms(self, percent: int) -> float:
        """By which that share of the requests were answered."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


@dataclass(frozen=True, kw_only=True)
class Bare:
    """One turn without a server, by runtime: milliseconds for one image and images a second in
    batches, decoding included; the forward pass alone in images a second of a batch.
    """

    one_ms: float
    images_per_second: float
    forward_images_per_second: float


# --- the models


def build_models(manifest: Manifest, folder: Path) -> dict[str, str]:
    """Train once, log each way into a store in `folder`; name to model address."""
    import mlflow

    from har.inference.classifier import CLASSIFIER_FOLDER, save_classifier
    from har.serving.package import log_classifier
    from har.training.train import train

    mlflow.set_tracking_uri(store_of(folder))
    mlflow.create_experiment("serving", artifact_location=f"{folder}/artifacts")
    mlflow.set_experiment("serving")
    result = train(RECIPE, manifest)
    models = {}
    with mlflow.start_run():
        for runtime in ("tensorflow", "openvino"):
            saved = folder / runtime / CLASSIFIER_FOLDER
            save_classifier(saved, result.model, result.class_names, RECIPE, runtime)
            models[runtime] = f"models:/{log_classifier(saved)}"
        models["no-op"] = log_no_op(folder)
        stock = mlflow.tensorflow.log_model(result.model, name="stock", pip_requirements=[])
        models["stock"] = f"models:/{stock.model_id}"
    return models


def store_of(folder: Path) -> str:
    """The tracking store in the scratch folder."""
    return f"sqlite:///{folder}/mlflow.db"


NO_OP = """
import mlflow

ROW = {
    "label": "sitting", "probability": 0.5, "error": None,
    "top_3": [{"label": "sitting", "probability": 0.5}] * 3,
}


class NoOp(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [ROW] * len(model_input)


mlflow.models.set_model(NoOp())
"""


def log_no_op(folder: Path) -> str:
    """What MLflow's server costs by itself: our signature, requests and answers, and no work."""
    import mlflow

    from har.serving.package import SIGNATURE

    code = folder / "no_op.py"
    code.write_text(NO_OP)
    logged = mlflow.pyfunc.log_model(
        name="no_op", python_model=str(code), signature=SIGNATURE, pip_requirements=["mlflow"]
    )
    return f"models:/{logged.model_id}"


# --- without a server


def load_bare(folder: Path, runtime: str) -> Any:
    """The saved classifier, once a process."""
    from har.inference.classifier import CLASSIFIER_FOLDER, load_classifier

    if runtime not in LOADED:
        LOADED[runtime] = load_classifier(folder / runtime / CLASSIFIER_FOLDER)
        LOADED[runtime].warm()
    return LOADED[runtime]


LOADED: dict[str, Any] = {}


def measure_bare(folder: Path, runtime: str, files: list[bytes]) -> Bare:
    """One turn. Decoding by as many threads as a server uses, no request, no row of text."""
    import numpy as np

    from har.inference.classifier import decoders

    classifier = load_bare(folder, runtime)

    def decode(some: list[bytes]) -> Any:
        return np.stack(list(decoders().map(classifier.decode, some)))

    singles = [
        timed(lambda data=data: classifier.forward(decode([data])))
        for data in itertools.islice(itertools.cycle(files), REQUESTS_A_TURN[1])
    ]
    batch = files[:BATCH]
    images = decode(batch)
    whole = [timed(lambda: classifier.forward(decode(batch))) for _ in range(10)]
    forward = [timed(lambda: classifier.forward(images)) for _ in range(10)]
    return Bare(
        one_ms=1000 * statistics.median(singles),
        images_per_second=BATCH / statistics.median(whole),
        forward_images_per_second=BATCH / statistics.median(forward),
    )


def timed(call: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_agreement(folder: Path, paths: list[str]) -> float:
    """The share of images that both runtimes give the same label."""
    files = [Path(path).read_bytes() for path in paths]
    labels = [
        [row["label"] for row in load_bare(folder, runtime).classify(files)]
        for runtime in ("tensorflow", "openvino")
    ]
    return sum(a == b for a, b in zip(*labels, strict=True)) / len(files)


def count_traces(folder: Path) -> int:
    """How often TensorFlow traced the model's function for batches of 1 to 32 images."""
    import numpy as np

    classifier = load_bare(folder, "tensorflow")
    size = classifier.recipe.image_size
    for count in range(1, BATCH + 1):
        classifier.forward(np.zeros((count, size, size, 3), np.uint8))
    return int(classifier.forward.compiled.experimental_get_tracing_count())


def as_pixels(folder: Path, files: list[bytes]) -> Body:
    """A batch decoded, as the JSON that the stock flavour takes."""
    images = [load_bare(folder, "tensorflow").decode(data).tolist() for data in files]
    return json.dumps({"instances": images}).encode(), "application/json"


# --- servers and clients


@contextmanager
def serving(model: str, folder: Path) -> Iterator[tuple[int, float]]:
    """`mlflow models serve`; its port, and how many seconds it took until it was ready."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = ["mlflow", "models", "serve", "--env-manager", "local", "-m", model]
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / f"{port}.log").open("w") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PATH": here, "MLFLOW_TRACKING_URI": store_of(folder)},
            start_new_session=True,
        )
        try:
            wait_until_ready(process, port, Path(log.name))
            yield port, time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Ask for its health until it answers."""
    for _ in range(10 * START_TIMEOUT_S):
        if process.poll() is not None:
            sys.exit(f"the server ended:\n{log.read_text()}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"no answer within {START_TIMEOUT_S} s:\n{log.read_text()}")


def as_request(files: list[bytes]) -> Body:
    """Images as most clients send them."""
    rows = [[base64.b64encode(data).decode()] for data in files]
    body = {"dataframe_split": {"columns": ["image"], "data": rows}}
    return json.dumps(body).encode(), "application/json"


def ask(connection: http.client.HTTPConnection, body: Body) -> bytes:
    """One answer; anything but 200 ends the benchmark."""
    data, content_type = body
    connection.request("POST", "/invocations", data, {"Content-Type": content_type})
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        sys.exit(f"status {answer.status}: {text[:500]!r}")
    return text


def ask_once(port: int, body: Body) -> bytes:
    """With a connection of its own."""
    return ask(http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S), body)


def load_server(
    server: str, port: int, bodies: list[Body], batch: int, clients: int, requests: int
) -> Cell:
    """`requests` in all, from `clients` threads that each keep a connection."""
    tasks = iter(list(itertools.islice(itertools.cycle(bodies), requests)))
    lock = threading.Lock()

    def client(_: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_TIMEOUT_S)
        # the connection itself is no part of an answer
        connection.connect()
        seconds = []
        while True:
            with lock:
                body = next(tasks, None)
            if body is None:
                connection.close()
                return seconds
            seconds.append(timed(functools.partial(ask, connection, body)))

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(client, range(clients)))
    return Cell(
        server=server,
        clients=clients,
        batch=batch,
        seconds=list(itertools.chain(*found)),
        total_s=time.perf_counter() - started,
    )


def check_answer(port: int, files: list[bytes]) -> None:
    """Every image has a label: speed means nothing where nothing was done."""
    rows = json.loads(ask_once(port, as_request(files)))["predictions"]
    assert len(rows) == len(files) and all(row["label"] and not row["error"] for row in rows)


# --- the measurement


def take_turns(
    models: dict[str, str],
    folder: Path,
    files: list[bytes],
    worker: ProcessPoolExecutor,
    count: int,
) -> tuple[dict[str, list[Bare]], list[Cell]]:
    """What is compared: bare, no-op and ours with one image; bare and ours with a batch."""
    bare: dict[str, list[Bare]] = {"tensorflow": [], "openvino": []}
    cells = []
    one = [as_request([data]) for data in files]
    batches = [as_request(files[start : start + BATCH]) for start in range(0, len(files), BATCH)]
    with (
        serving(models["no-op"], folder) as (no_op, _),
        serving(models["tensorflow"], folder) as (ours, _),
        serving(models["openvino"], folder) as (faster, _),
    ):
        ports = {"no-op": no_op, "tensorflow": ours, "openvino": faster}
        check_answer(ours, files[:BATCH])
        check_answer(faster, files[:BATCH])
        for turn in range(count + 1):
            say(f"turn {turn} of {count}")
            for runtime, found in bare.items():
                found.append(worker.submit(measure_bare, folder, runtime, files).result())
            for name, port in ports.items():
                cells.append(load_server(name, port, one, 1, 1, REQUESTS_A_TURN[1]))
                cells.append(load_server(name, port, batches, BATCH, 1, REQUESTS_A_TURN[BATCH]))
    # the first turn warms up
    warm = len(ports) * 2
    return {name: found[1:] for name, found in bare.items()}, cells[warm:]


def measure_concurrency(models: dict[str, str], folder: Path, files: list[bytes]) -> list[Cell]:
    """The table: every number of clients, single images and batches."""
    cells = []
    one = [as_request([data]) for data in files]
    batches = [as_request(files[start : start + BATCH]) for start in range(0, len(files), BATCH)]
    for runtime in ("tensorflow", "openvino"):
        with serving(models[runtime], folder) as (port, _):
            check_answer(port, files[:BATCH])
            for clients in CLIENTS:
                say(f"{runtime}: {clients} clients")
                for batch, bodies in ((1, one), (BATCH, batches)):
                    requests = REQUESTS[batch]
                    cells.append(load_server(runtime, port, bodies, batch, clients, requests))
    return cells


def measure_stock(models: dict[str, str], folder: Path, body: Body, files: list[bytes]) -> Any:
    """Ours and the stock flavour in turns, one client, a batch; both cells of each turn."""
    bodies = [as_request(files[:BATCH])]
    pairs = []
    with (
        serving(models["tensorflow"], folder) as (ours, _),
        serving(models["stock"], folder) as (stock, _),
    ):
        for turn in range(3 + 1):
            say(f"stock flavour: turn {turn} of 3")
            pairs.append(
                (
                    load_server("tensorflow", ours, bodies, BATCH, 1, 5),
                    load_server("stock", stock, [body], BATCH, 1, 2),
                )
            )
    return pairs[1:]


def measure_cold_starts(
    models: dict[str, str], folder: Path, files: list[bytes]
) -> dict[str, list[float]]:
    """Seconds from the command to the first answer to a real image; no-op is MLflow's own part."""
    found: dict[str, list[float]] = {name: [] for name in ("no-op", "tensorflow", "openvino")}
    body = as_request(files[:1])
    for turn in range(COLD_STARTS):
        say(f"cold start {turn + 1} of {COLD_STARTS}")
        for name, seconds in found.items():
            with serving(models[name], folder) as (port, ready_s):
                seconds.append(ready_s + timed(functools.partial(ask_once, port, body)))
    return found


# --- what is printed


def one_of(cells: list[Cell], server: str) -> list[float]:
    """Median milliseconds of each turn's requests with one image."""
    return [c.percentile_ms(50) for c in cells if (c.server, c.batch) == (server, 1)]


def rate_of(cells: list[Cell], server: str) -> list[float]:
    """Images a second of each turn's batches."""
    return [c.images_per_second for c in cells if (c.server, c.batch) == (server, BATCH)]


def build_bars(
    bare: dict[str, list[Bare]], turns: list[Cell], stock: Any, agreement: float, traces: int
) -> list[Bar]:
    """Every claim with what was measured; ratios are taken within a turn."""
    ours = bare["tensorflow"]
    overhead = [
        served - alone.one_ms - nothing
        for served, alone, nothing in zip(
            one_of(turns, "tensorflow"), ours, one_of(turns, "no-op"), strict=True
        )
    ]
    to_bare = [
        rate / each.images_per_second
        for rate, each in zip(rate_of(turns, "tensorflow"), ours, strict=True)
    ]
    to_stock = [mine.images_per_second / its.images_per_second for mine, its in stock]
    forward = [
        fast.forward_images_per_second / slow.forward_images_per_second
        for fast, slow in zip(bare["openvino"], ours, strict=True)
    ]
    faster = statistics.median(forward)
    rows = [
        (
            "p50 of one image - (bare + no-op server), ms",
            statistics.median(overhead),
            OVERHEAD_MS,
            False,
        ),
        ("batch 32: served / bare", statistics.median(to_bare), BATCH_TO_BARE, True),
        ("batch 32: served / stock", statistics.median(to_stock), BATCH_TO_STOCK, True),
        (
            "forward: openvino / tensorflow",
            faster,
            OPENVINO_TO_TENSORFLOW,
            True,
        ),
        ("same label: openvino, tensorflow", agreement, AGREEMENT, True),
        ("times TensorFlow traced the model", traces, 1, False),
    ]
    return [Bar(claim=c, measured=m, bound=b, at_least=a) for c, m, b, a in rows]


def part_lines(bare: dict[str, list[Bare]], turns: list[Cell]) -> list[str]:
    """Where the time of one request goes."""
    lines = ["", f"{'in turns, one client':<32}{'1 image, ms':>14}{'32: images/s':>14}"]
    for runtime, found in bare.items():
        one = statistics.median(each.one_ms for each in found)
        rate = statistics.median(each.images_per_second for each in found)
        lines.append(f"{'bare, ' + runtime:<32}{one:>14.1f}{rate:>14.0f}")
    for name in ("no-op", *bare):
        one, rate = statistics.median(one_of(turns, name)), statistics.median(rate_of(turns, name))
        lines.append(f"{'served, ' + name:<32}{one:>14.1f}{rate:>14.0f}")
    lines.append(f"{'forward pass alone':<32}")
    for runtime, found in bare.items():
        rate = statistics.median(each.forward_images_per_second for each in found)
        lines.append(f"{'  ' + runtime:<32}{'':>14}{rate:>14.0f}")
    return lines


def cell_lines(cells: list[Cell]) -> list[str]:
    """The table of concurrency."""
    lines = ["", f"{'server':<12}{'clients':>9}{'images':>9}{'p50 ms':>10}{'p95 ms':>10}"]
    lines[-1] += f"{'p99 ms':>10}{'images/s':>11}"
    for cell in cells:
        times = "".join(f"{cell.percentile_ms(p):>10.1f}" for p in (50, 95, 99))
        head = f"{cell.server:<12}{cell.clients:>9}{cell.batch:>9}"
        lines.append(f"{head}{times}{cell.images_per_second:>11.0f}")
    return lines


def cold_lines(cold: dict[str, list[float]]) -> list[str]:
    """Medians and extremes."""
    lines = ["", f"{'cold start to first answer, s':<32}{'median':>10}{'least':>10}{'most':>10}"]
    for name, seconds in cold.items():
        row = (statistics.median(seconds), min(seconds), max(seconds))
        lines.append(f"{name:<32}" + "".join(f"{each:>10.1f}" for each in row))
    return lines


def measure(manifest: Manifest, folder: Path, count: int) -> tuple[dict[str, Any], list[Bar]]:
    """Every part, one after the other."""
    say("training and logging the models")
    models = in_fresh_process(build_models, manifest, folder)
    test = manifest.rows("test")["path"]
    files = [(manifest.root / path).read_bytes() for path in test[: 2 * BATCH]]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
        worker.submit(load_tensorflow).result()
        bare, turns = take_turns(models, folder, files, worker, count)
        traces = worker.submit(count_traces, folder).result()
        some = manifest.table["path"].sample(frac=1, random_state=0)[:AGREEMENT_IMAGES]
        paths = [str(manifest.root / path) for path in some]
        say(f"labels of {len(paths):,} images by both runtimes")
        agreement = worker.submit(measure_agreement, folder, paths).result()
        pixels = worker.submit(as_pixels, folder, files[:BATCH]).result()
    stock = measure_stock(models, folder, pixels, files)
    cells = measure_concurrency(models, folder, files)
    cold = measure_cold_starts(models, folder, files)
    bars = build_bars(bare, turns, stock, agreement, traces)
    tables = (part_lines(bare, turns), cell_lines(cells), cold_lines(cold), bar_lines(bars))
    click.echo("\n".join(itertools.chain(*tables)))
    found = {
        "bare": {name: [asdict(each) for each in rows] for name, rows in bare.items()},
        "turns": [asdict(each) for each in turns],
        "stock": [[asdict(each) for each in pair] for pair in stock],
        "agreement": {"images": len(paths), "share": agreement},
        "concurrency": [asdict(each) for each in cells],
        "cold_start_s": cold,
    }
    return found, bars


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, help="folder of images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "serving.json", show_default=True)
@click.option("--turns", type=click.IntRange(1), default=9, show_default=True)
def main(data: str, out: Path, turns: int) -> None:
    """Measure, print, write, evaluate."""
    manifest = load_images(data)
    machine = find_machine()
    click.echo(
        f"EfficientNet-Lite0 at {RECIPE.image_size} px, images of {manifest.name};"
        f" {machine['cpu']}, {machine['cores']} cores; TensorFlow {machine['tensorflow']}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        found, bars = measure(manifest, Path(scratch), turns)
    finish(out, {"machine": machine, "dataset_digest": manifest.dataset_digest, **found}, bars)


if __name__ == "__main__":
    main()
