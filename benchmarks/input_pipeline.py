"""Compare ways to read images; measure the memory of an epoch and the seconds in callbacks.

    python benchmarks/input_pipeline.py --data DIR

Our stream loader, the usual tf.data loop and the original notebook's PIL loop take turns over the
same files. Memory is that of one epoch in a fresh process. Callbacks are clocked in `har run` with
EfficientNet-Lite0, whose steps are the shortest, so that callbacks weigh the most.
"""

import contextlib
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.recipe import VARIANTS
from measuring import Claim, Tables, Turns

V3 = replace(VARIANTS["v3"], epochs=1)
SIZE = V3.image_size
MOST_IMAGES = 6000
RATE, TF_LOOP, PIL_LOOP = "images/s", "bare tf.data loop", "PIL loop"


def build_tf_loop(manifest: Manifest, dct_method: str) -> Iterable[Any]:
    """Build the usual tf.data loop over files and labels, as v2's notebook has it.

    It rounds to whole levels, as our decoder does. With INTEGER_ACCURATE it does the same work as
    the stream; "" is TensorFlow's default, which is faster and less exact.
    """
    import tensorflow as tf

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method=dct_method)
        return tf.cast(tf.round(tf.image.resize(image, (SIZE, SIZE))), tf.uint8), label

    paths = [str(manifest.root / path) for path in manifest.table["path"]]
    files = tf.data.Dataset.from_tensor_slices((paths, manifest.table["label_id"].to_numpy()))
    auto = tf.data.AUTOTUNE
    return files.map(load, num_parallel_calls=auto).batch(V3.batch_size).prefetch(auto)


def run_pil_loop(manifest: Manifest) -> Iterator[tuple[list[Any], None]]:
    """Yield all images as one batch, read as in the original notebook: one after the other."""
    files = [manifest.root / path for path in manifest.table["path"]]
    yield [np.asarray(Image.open(path).resize((SIZE, SIZE))) for path in files], None


def go_over(batches: Iterable[Any]) -> dict[str, float]:
    """Take every batch and do nothing with it; the CPU seconds are those of all cores."""
    # the clocks stop before the iterator is dropped, for which TensorFlow can take seconds
    iterator, started, cpu = iter(batches), time.perf_counter(), time.process_time()
    images = sum(len(batch) for batch, _ in iterator)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {RATE: images / seconds, "CPU s/1,000": 1000 * cpu_s / images}


def measure_speed(manifest: Manifest, turns: int) -> Turns:
    """Let all ways to read take turns."""
    import internals

    stream = internals.build_epoch(manifest, replace(V3, augmentation="none"))
    augmented = internals.build_epoch(manifest, V3)
    accurate, fast = build_tf_loop(manifest, "INTEGER_ACCURATE"), build_tf_loop(manifest, "")
    calls = {
        "stream": lambda: go_over(stream),
        TF_LOOP: lambda: go_over(accurate),
        PIL_LOOP: lambda: go_over(run_pil_loop(manifest)),
        "bare tf.data loop, fast DCT": lambda: go_over(fast),
        "stream, augmented": lambda: go_over(augmented),
    }
    return measuring.take_turns(calls, turns)


def measure_memory(manifest: Manifest, loader: str) -> float:
    """Return by how many megabytes the process grows in an epoch."""
    import internals

    recipe = replace(V3, loader=loader, augmentation="none")
    _, grown_mb = measuring.watched(lambda: go_over(internals.build_epoch(manifest, recipe)))
    return grown_mb


def measure_callbacks(data: str, folder: Path) -> dict[str, float]:
    """Run `har run` in this process; return the seconds of `fit`, its callbacks and its logging."""
    import keras
    import mlflow

    from har.cli.main import main

    os.chdir(folder)
    os.environ |= measuring.store_in(folder)
    seconds: Counter[str] = Counter()
    found: dict[str, float] = {}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # Keras looks at attributes of callbacks' methods: wraps copies them
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[name] += time.perf_counter() - started

        return call

    plain_fit = clocked("fit", keras.Model.fit)

    def fit(model: Any, *arguments: Any, callbacks: Any, **named: Any) -> Any:
        for each in callbacks:
            for name in [name for name in dir(each) if name.startswith("on_")]:
                setattr(each, name, clocked("callbacks", getattr(each, name)))
        seconds.clear()
        result = plain_fit(model, *arguments, callbacks=callbacks, **named)
        found.update(seconds)
        return result

    log_batch = clocked("logging", mlflow.MlflowClient.log_batch)
    with (
        mock.patch.object(keras.Model, "fit", fit),
        mock.patch.object(mlflow.MlflowClient, "log_batch", log_batch),
    ):
        lite = ["--backbone", "efficientnet-lite0", "--epochs", "2"]
        with contextlib.suppress(SystemExit):
            main(["run", "--variant", "v3", "--data", data, *lite])
    return found


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure speed, memory and callbacks one after the other."""
    manifest = measuring.some_images(load_manifest(data), 160 if tiny else MOST_IMAGES)
    turns = measuring.in_fresh_process(measure_speed, manifest, 1 if tiny else 5)
    ratios = {name: measuring.median_ratio(turns, RATE, name, TF_LOOP) for name in turns}
    speed = [row | {"to bare loop": ratios[row["name"]]} for row in measuring.summarise(turns)]
    most, memory = len(manifest.table), []
    for loader, count in (("stream", most // 4), ("stream", most), ("memory", most)):
        some = measuring.some_images(manifest, count)
        grown_mb = measuring.in_fresh_process(measure_memory, some, loader)
        memory.append({"name": f"loader {loader}", "images": count, "growth MB": grown_mb})
    fit = measuring.in_fresh_process(measure_callbacks, data, scratch)
    shares = [{"name": name, "seconds": s, "of fit": s / fit["fit"]} for name, s in fit.items()]
    # 0: the memory does not grow with the images; 1: all of them are kept decoded
    kept = (memory[1]["growth MB"] - memory[0]["growth MB"]) / (
        (most - most // 4) * SIZE * SIZE * 3 / 1e6
    )
    to_pil = measuring.median_ratio(turns, RATE, "stream", PIL_LOOP)
    inside = (fit["callbacks"] + fit["logging"]) / fit["fit"]
    return {"speed": speed, "memory": memory, "training": shares}, [
        Claim("stream / bare tf.data loop", ratios["stream"], ">=", 0.9),
        Claim("stream / PIL loop", to_pil, ">=", 2.5),
        Claim("stream: share of additional images kept", kept, "<=", 0.05),
        Claim("callbacks and logging / fit", inside, "<=", 0.02),
    ]


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
