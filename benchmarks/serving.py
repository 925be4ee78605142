"""Measure how fast the served model answers, beside what it cannot do without.

    python benchmarks/serving.py --data DIR

- `har run` trains a model for one epoch, for TensorFlow and for OpenVINO. The first is also logged
  in MLflow's stock TensorFlow flavour, which takes decoded pixels as JSON; a no-op model answers
  the same row to every image;
- each is served by `mlflow models serve` and asked over loopback by this process. The servers, and
  bare calls of decoding and forward pass in a process without a server, take turns;
- then 16 clients at once, cold starts, and the labels of both runtimes by `har predict`.
"""

import csv
import itertools
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import measuring
from har.data.prepare import load_manifest
from har.util.progress import say
from measuring import RUNTIMES, Claim, Tables, Turns

BATCH, CLIENTS = 32, 16
ONE, BATCHES, FORWARD = "1 image, ms", "32: images/s", "forward alone"
LITE = ("--backbone", "efficientnet-lite0", "--epochs", "1")
NO_OP = """
import mlflow

TOP = {"label": "sitting", "probability": 0.5}


class NoOp(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [{**TOP, "top_3": [TOP] * 3, "error": None}] * len(model_input)


mlflow.models.set_model(NoOp())
"""


def _log_models(uri: str, folder: Path) -> dict[str, str]:
    """Log the no-op model, and the network of model `uri` in the stock TensorFlow flavour."""
    import keras
    import mlflow

    local = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder / "model")))
    network = keras.models.load_model(local / "artifacts/classifier/model.keras", compile=False)
    code = folder / "no_op.py"
    code.write_text(NO_OP)
    no_op = mlflow.pyfunc.log_model(
        name="no_op",
        python_model=str(code),
        signature=mlflow.models.get_model_info(uri).signature,
        pip_requirements=["mlflow"],
    )
    stock = mlflow.tensorflow.log_model(network, name="stock", pip_requirements=[])
    return {"no-op": f"models:/{no_op.model_id}", "stock": f"models:/{stock.model_id}"}


# --- without a server


@cache
def _load_bare(uri: str) -> Any:
    import internals

    return internals.load_bare(uri)


def _measure_bare(uri: str, files: list[bytes]) -> dict[str, float]:
    """Measure decoding and forward pass of one image and of a batch, and the forward pass alone."""
    decode, forward = _load_bare(uri)
    batch = files[:BATCH]
    images = decode(batch)
    one_s = [measuring.timed(lambda data=data: forward(decode([data]))) for data in files[:40]]
    batch_s = [measuring.timed(lambda: forward(decode(batch))) for _ in range(10)]
    forward_s = [measuring.timed(lambda: forward(images)) for _ in range(10)]
    return {
        ONE: 1000 * statistics.median(one_s),
        BATCHES: BATCH / statistics.median(batch_s),
        FORWARD: BATCH / statistics.median(forward_s),
    }


def _encode_pixels(uri: str, files: list[bytes]) -> bytes:
    """Encode decoded images as the JSON that the stock flavour takes."""
    decode, _ = _load_bare(uri)
    return json.dumps({"instances": decode(files).tolist()}).encode()


# --- servers and clients


def _send(port: int, bodies: list[bytes], clients: int = 1) -> tuple[list[float], float]:
    """Send all bodies from `clients` threads; return the seconds of each request, and of all."""

    def send_one(body: bytes) -> None:
        status, text = measuring.ask(port, body)
        if status != 200 or b'"label": null' in text:
            raise RuntimeError(f"status {status}: {text[:500]!r}")

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        seconds = list(pool.map(lambda body: measuring.timed(partial(send_one, body)), bodies))
    return seconds, time.perf_counter() - started


def _measure_served(
    port: int, files: list[bytes], count: int, clients: int = 1
) -> dict[str, float]:
    """Send `count` requests of one image, and a tenth of that of a batch."""
    singles = [measuring.encode_request([data]) for data in files]
    batches = [measuring.encode_request(files[n : n + BATCH]) for n in (0, BATCH)]
    one_s, _ = _send(port, list(itertools.islice(itertools.cycle(singles), count)), clients)
    bodies = list(itertools.islice(itertools.cycle(batches), count // 10))
    return {
        ONE: 1000 * statistics.median(one_s),
        "1 image, p99 ms": 1000 * statistics.quantiles(one_s, n=100)[-1],
        BATCHES: BATCH * len(bodies) / _send(port, bodies, clients)[1],
    }


def _measure_servers(
    models: dict[str, str], scratch: Path, files: list[bytes], turns: int
) -> tuple[Turns, Tables]:
    """Start the servers, let them and bare calls take turns, then ask from many clients."""
    with ExitStack() as stack:
        worker = stack.enter_context(measuring.fresh_process())
        pixels = worker.submit(_encode_pixels, models["tensorflow"], files[:BATCH]).result()
        one = measuring.encode_request(files[:1])
        ports, cold = {}, []
        for name, uri in models.items():
            started = time.perf_counter()
            ports[name] = stack.enter_context(measuring.serve_model(uri, scratch))
            _send(ports[name], [pixels if name == "stock" else one])
            cold.append({"name": name, "seconds": time.perf_counter() - started})

        def call_bare(runtime: str) -> dict[str, float]:
            return worker.submit(_measure_bare, models[runtime], files).result()

        calls: dict[str, Any] = {f"bare, {each}": partial(call_bare, each) for each in RUNTIMES}
        for name in ("no-op", *RUNTIMES):
            calls[f"served, {name}"] = partial(_measure_served, ports[name], files, 40)
        calls["served, stock"] = lambda: {BATCHES: BATCH / _send(ports["stock"], [pixels])[1]}
        found = measuring.take_turns(calls, turns)
        say(f"{CLIENTS} clients")
        clients = _measure_served(ports["openvino"], files, 360, CLIENTS)
    return found, {
        "in turns, one client": measuring.summarise(found),
        f"{CLIENTS} clients at once": [{"name": "served, openvino", **clients}],
        "cold start to first answer": cold,
    }


def _measure_agreement(models: dict[str, str], images: Path, scratch: Path) -> float:
    """Return the share of images that both runtimes give the same label, by `har predict`."""
    labels = []
    for runtime in RUNTIMES:
        out = scratch / f"{runtime}.csv"
        words = ("--data", str(images), "--model", models[runtime], "--out", str(out))
        measuring.har("predict", *words, folder=scratch)
        with out.open(newline="") as file:
            labels.append([(row["filename"], row["label"]) for row in csv.DictReader(file)])
    return sum(a == b for a, b in zip(*labels, strict=True)) / len(labels[0])


def _compare(turns: Turns, agreement: float) -> list[Claim]:
    ours, bare = "served, tensorflow", "bare, tensorflow"
    overhead = statistics.median(
        each[ONE] - alone[ONE] - no_op[ONE]
        for each, alone, no_op in zip(turns[ours], turns[bare], turns["served, no-op"], strict=True)
    )
    ratio = partial(measuring.median_ratio, turns)
    forward = ratio(FORWARD, "bare, openvino", bare)
    return [
        Claim("one image: served - bare - no-op, ms", overhead, "<=", 3),
        Claim("batch of 32: served / bare", ratio(BATCHES, ours, bare), ">=", 0.8),
        Claim("batch of 32: served / stock", ratio(BATCHES, ours, "served, stock"), ">=", 10),
        Claim("forward pass: openvino / tensorflow", forward, ">=", 1.3),
        Claim("same label: openvino, tensorflow", agreement, ">=", 0.995),
    ]


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Log the models, then run every part."""
    manifest = load_manifest(data)
    os.environ |= measuring.store_in(scratch)
    models = {}
    for name in RUNTIMES:
        run = measuring.har_run("v3", data, scratch, *LITE, "--runtime", name)
        models[name] = f"runs:/{run['run_id']}/model"
    models |= measuring.in_fresh_process(_log_models, models["tensorflow"], scratch)
    paths = itertools.islice(itertools.cycle(manifest.rows("test")["path"]), 2 * BATCH)
    files = [(manifest.root / path).read_bytes() for path in paths]
    turns, tables = _measure_servers(models, scratch, files, 1 if tiny else 9)
    count = min(64 if tiny else 2000, len(manifest.table))
    images = measuring.repeat_images(manifest, count, scratch / "labelled") / "train"
    return tables, _compare(turns, _measure_agreement(models, images, scratch))


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
