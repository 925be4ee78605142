"""Compare ways to read images; measure the memory of an epoch and the seconds in callbacks.

    python benchmarks/input_pipeline.py --data DIR

Our stream loader, the usual tf.data loop and the original notebook's PIL loop take turns over the
same files. Memory is that of one epoch in a fresh process. Callbacks are clocked in `har run` with
EfficientNet-Lite0, whose steps are the shortest, so that callbacks weigh the most.
"""

import functools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def _build_tf_loop(manifest: Manifest, dct_method: str) -> Iterable[Any]:
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


def _run_pil_loop(manifest: Manifest) -> Iterator[tuple[list[Any], None]]:
    """Yield all images as one batch, read as in the original notebook: one after the other."""
    files = [manifest.root / path for path in manifest.table["path"]]
    yield [np.asarray(Image.open(path).resize((SIZE, SIZE))) for path in files], None


def _go_over(batches: Iterable[Any]) -> dict[str, float]:
    """Take every batch and do nothing with it; the CPU seconds are those of all cores."""
    # the clocks stop before the iterator is dropped, for which TensorFlow can take seconds
    iterator, started, cpu = iter(batches), time.perf_counter(), time.process_time()
    images = sum(len(batch) for batch, _ in iterator)
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {RATE: images / seconds, "CPU s/1,000": 1000 * cpu_s / images}


def _measure_speed(manifest: Manifest, turns: int) -> Turns:
    """Let all ways to read take turns."""
    import internals

    stream = internals.build_epoch(manifest, replace(V3, augmentation="none"))
    augmented = internals.build_epoch(manifest, V3)
    accurate, fast = _build_tf_loop(manifest, "INTEGER_ACCURATE"), _build_tf_loop(manifest, "")
    calls = {
        "stream": lambda: _go_over(stream),
        TF_LOOP: lambda: _go_over(accurate),
        PIL_LOOP: lambda: _go_over(_run_pil_loop(manifest)),
        "bare tf.data loop, fast DCT": lambda: _go_over(fast),
        "stream, augmented": lambda: _go_over(augmented),
    }
    return measuring.take_turns(calls, turns)


def _measure_memory(manifest: Manifest, loader: str) -> float:
    """Return by how many megabytes the process grows in an epoch."""
    import internals

    recipe = replace(V3, loader=loader, augmentation="none")
    _, grown_mb = measuring.watched(lambda: _go_over(internals.build_epoch(manifest, recipe)))
    return grown_mb


def _clock(owner: Any, name: str, seconds: Counter[str], label: str) -> None:
    """Add the seconds of all calls of a method to `seconds[label]`."""
    function = getattr(owner, name)

    # Keras looks at attributes of callbacks' methods: wraps copies them
    @functools.wraps(function)
    def clocked(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments, **named)
        seconds[label] += time.perf_counter() - started
        return result

    setattr(owner, name, clocked)


def _measure_callbacks(data: str, folder: Path) -> dict[str, float]:
    """Run `har run` in this process; return the seconds of `fit`, its callbacks and its logging."""
    import keras
    import mlflow

    from har.cli.main import main

    os.chdir(folder)
    os.environ |= measuring.store_in(folder)
    seconds: Counter[str] = Counter()
    found: dict[str, float] = {}

    plain_fit = keras.Model.fit

    def fit(model: Any, *arguments: Any, callbacks: Any, **named: Any) -> Any:
        for each in callbacks:
            for name in [name for name in dir(each) if name.startswith("on_")]:
                _clock(each, name, seconds, "callbacks")
        seconds.clear()
        started = time.perf_counter()
        result = plain_fit(model, *arguments, callbacks=callbacks, **named)
        found.update(seconds, fit=time.perf_counter() - started)
        return result

    keras.Model.fit = fit
    _clock(mlflow.MlflowClient, "log_batch", seconds, "logging")
    lite = ["--backbone", "efficientnet-lite0", "--epochs", "2"]
    try:
        main(["run", "--variant", "v3", "--data", data, *lite])
    except SystemExit as status:
        if status.code:
            raise RuntimeError(f"har run ended with status {status.code}") from status
    return found


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure speed, memory and callbacks one after the other."""
    manifest = measuring.some_images(load_manifest(data), 160 if tiny else MOST_IMAGES)
    turns = measuring.in_fresh_process(_measure_speed, manifest, 1 if tiny else 5)
    ratios = {name: measuring.median_ratio(turns, RATE, name, TF_LOOP) for name in turns}
    speed = [row | {"to bare loop": ratios[row["name"]]} for row in measuring.summarise(turns)]
    most, memory = len(manifest.table), []
    for loader, count in (("stream", most // 4), ("stream", most), ("memory", most)):
        some = measuring.some_images(manifest, count)
        grown_mb = measuring.in_fresh_process(_measure_memory, some, loader)
        memory.append({"name": f"loader {loader}", "images": count, "growth MB": grown_mb})
    fit = measuring.in_fresh_process(_measure_callbacks, data, scratch)
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
