"""What the input pipeline costs: images a second, memory, and seconds in our callbacks.

    python benchmarks/input_pipeline.py --data DIR

Everything runs in this one command, on the images of DIR (a folder that `har run --data`
takes), in three parts:

- speed: our stream loader, the tf.data loop that one writes by hand and the original
  notebook's PIL loop take turns over the same files, so that a busy machine disturbs all of
  them; a ratio is the median of the ratios within a turn;
- memory: one epoch of the stream, each time in a fresh process, over 1,500 to 6,000 images;
- callbacks: a real training of EfficientNet-Lite0, recorded in a real MLflow store, in which
  every call into our code during `fit` is clocked.

Prints a table, writes it as JSON, and exits with 1 if one of the bars is missed.
"""

import functools
import itertools
import logging
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import psutil
from PIL import Image

from har.data.manifest import Manifest
from har.recipe import VARIANTS
from har.util.progress import say
from measuring import (
    RESULTS,
    Bar,
    bar_lines,
    find_machine,
    finish,
    first_images,
    in_fresh_process,
    load_images,
)

V3 = VARIANTS["v3"]
SIZE, BATCH = V3.image_size, V3.batch_size
MOST_IMAGES = 6000

STREAM_TO_BARE_LOOP = 0.9
STREAM_TO_PIL_LOOP = 2.5
# Of what the additional images weigh decoded. Keeping all of them would come out at 1 or more,
# keeping the files as they are at about 0.2; a path is 100 bytes to an image's 77,000.
MEMORY_KEPT = 0.05
CALLBACK_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One way once over the images. `cpu_s` counts every core's seconds in this process;
    `others` is the share of the machine that other processes took meanwhile; `disposal_s` is
    how long TensorFlow then took to drop the iterator.
    """

    images: int
    seconds: float
    cpu_s: float
    others: float
    disposal_s: float

    @property
    def images_per_second(self) -> float:
        """From asking for the first batch to having the last."""
        return self.images / self.seconds


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory in 10^6 bytes before an epoch's data set was built, and by how much it
    had grown when it was largest.
    """

    loader: str
    images: int
    before_mb: float
    growth_mb: float


@dataclass(frozen=True, kw_only=True)
class FitCost:
    """Seconds of one `fit`, and those of them inside each kind of our code.

    `background_cpu_s` is the CPU time of MLflow's thread that samples the machine meanwhile:
    it holds nobody up but for what it takes of the processor. `disposal_s` is the time that
    TensorFlow took to drop the iterators, after each validation and at the end.
    """

    fit_s: float
    inside_s: dict[str, float]
    calls: dict[str, int]
    background_cpu_s: float
    disposal_s: float
    epochs: int

    @property
    def share(self) -> float:
        """Of fit's seconds, those in our callbacks and logging, the background included."""
        return (sum(self.inside_s.values()) + self.background_cpu_s) / self.fit_s


def bare_loop(manifest: Manifest, dct_method: str) -> Iterable[Any]:
    """The usual hand-written tf.data loop over files and labels, as v2's notebook has it.

    It rounds to whole levels as our decoder does. With `dct_method` INTEGER_ACCURATE it does
    the same work as the stream; "" is TensorFlow's default, the faster and coarser DCT.
    """
    import tensorflow as tf

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3, dct_method=dct_method)
        return tf.cast(tf.round(tf.image.resize(image, (SIZE, SIZE))), tf.uint8), label

    return (
        tf.data.Dataset.from_tensor_slices((files(manifest), manifest.table["label_id"].to_numpy()))
        .map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH)
        .prefetch(tf.data.AUTOTUNE)
    )


def stream(manifest: Manifest, augmentation: str) -> Iterable[Any]:
    """One epoch of v3's training data as `har run` builds it: shuffled, and whole batches."""
    from har.training.loaders import build_training_dataset

    recipe = replace(V3, augmentation=augmentation, epochs=1)
    return build_training_dataset(manifest, manifest.table, recipe)


class PilLoop:
    """The original notebook's loop: one thread, one file after the other, all of them kept.

    Its last step, one array of everything, is left out: in the notebook's favour.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Nothing is read yet."""
        self.files = files(manifest)

    def __iter__(self) -> Iterator[tuple[list[Any], None]]:
        """One "batch" of every image; Pillow's default filter is bicubic."""
        import numpy as np

        images = [np.asarray(Image.open(path).resize((SIZE, SIZE))) for path in self.files]
        yield images, None


def files(manifest: Manifest) -> list[str]:
    """Every image's path."""
    return [str(manifest.root / path) for path in manifest.table["path"]]


# Each row of the table of speeds. Bars compare the first three; the others are for the reader.
CONTENDERS: dict[str, Callable[[Manifest], Iterable[Any]]] = {
    "stream": functools.partial(stream, augmentation="none"),
    "bare tf.data loop": functools.partial(bare_loop, dct_method="INTEGER_ACCURATE"),
    "PIL loop": PilLoop,
    "bare tf.data loop, fast DCT": functools.partial(bare_loop, dct_method=""),
    "stream, augmented": functools.partial(stream, augmentation=V3.augmentation),
}


def measure_speed(manifest: Manifest, repetitions: int) -> dict[str, list[Pass]]:
    """Let the contenders take turns. A first turn is not counted: it fills the page cache."""
    from har.models.devices import make_deterministic

    # as in training; it costs the bare loop nothing (the CPU seconds are the same without)
    make_deterministic()
    contenders = {name: build(manifest) for name, build in CONTENDERS.items()}
    passes: dict[str, list[Pass]] = {name: [] for name in contenders}
    for turn in range(repetitions + 1):
        say(f"speed: turn {turn} of {repetitions}")
        for name, batches in contenders.items():
            passes[name].append(go_over(batches))
    return {name: found[1:] for name, found in passes.items()}


def go_over(batches: Iterable[Any]) -> Pass:
    """Take every batch and do nothing with it.

    The clock stops at the last batch. Dropping a tf.data iterator can then take seconds, which
    say nothing of the pipeline's speed: its autotuner, told to stop, sometimes sleeps on until
    it would have tuned next.
    """
    images, clock = 0, MachineClock()
    iterator = iter(batches)
    for batch, _ in iterator:
        images += len(batch)
    seconds, cpu_s, others = clock.read()
    # the last batch may be the iterator's own memory
    batch = None
    started = time.perf_counter()
    del iterator
    disposal_s = time.perf_counter() - started
    return Pass(images=images, seconds=seconds, cpu_s=cpu_s, others=others, disposal_s=disposal_s)


class MachineClock:
    """From its making on: seconds, this process' CPU seconds, other processes' share of the
    machine, 0 to 1. A busy machine slows the many-threaded contenders the most.
    """

    def __init__(self) -> None:
        """Start."""
        self.start = self.now()

    @staticmethod
    def now() -> tuple[float, float, float]:
        """Seconds; CPU seconds of this process; CPU seconds of all processes."""
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0)
        return time.perf_counter(), time.process_time(), busy

    def read(self) -> tuple[float, float, float]:
        """The three."""
        seconds, cpu_s, busy = (
            after - before for before, after in zip(self.start, self.now(), strict=True)
        )
        others = max(0.0, busy - cpu_s) / (seconds * (psutil.cpu_count() or 1))
        return seconds, cpu_s, others


def paired_ratio(ours: list[Pass], theirs: list[Pass]) -> float:
    """The median over the turns of how many times as many images a second we read."""
    return statistics.median(
        our.images_per_second / their.images_per_second
        for our, their in zip(ours, theirs, strict=True)
    )


def image_counts(available: int) -> tuple[int, int, int]:
    """A quarter, half and all of the images, at most 6,000: 1,500, 3,000, 6,000."""
    most = min(available, MOST_IMAGES)
    return most // 4, most // 2, most


def measure_memory(manifest: Manifest, loader: str, images: int) -> Memory:
    """Go through one epoch of `images` images drawn at random; look after every batch.

    Not `ru_maxrss` alone: importing TensorFlow may have needed more than the epoch does.
    """
    from har.models.devices import make_deterministic
    from har.training.loaders import build_training_dataset

    make_deterministic()
    rows = manifest.table.sample(images, random_state=0).reset_index(drop=True)
    recipe = replace(V3, loader=loader, augmentation="none", epochs=1)
    process = psutil.Process()
    before = process.memory_info().rss
    highest = before
    for _ in build_training_dataset(manifest, rows, recipe):
        highest = max(highest, process.memory_info().rss)
    return Memory(
        loader=loader,
        images=images,
        before_mb=before / 1e6,
        growth_mb=(highest - before) / 1e6,
    )


def measure_memories(manifest: Manifest, repetitions: int) -> list[Memory]:
    """The stream at three sizes in turn, then the memory loader once, for contrast."""
    counts = image_counts(len(manifest.table))
    tasks = [*[("stream", count) for count in counts] * repetitions, ("memory", counts[-1])]
    found = []
    for loader, images in tasks:
        say(f"memory: loader {loader}, {images:,} images")
        found.append(in_fresh_process(measure_memory, manifest, loader, images))
    return found


def median_growth(memories: list[Memory]) -> dict[tuple[str, int], float]:
    """(loader, images) to the median growth in 10^6 bytes."""
    kinds = dict.fromkeys((each.loader, each.images) for each in memories)
    return {
        kind: statistics.median(m.growth_mb for m in memories if (m.loader, m.images) == kind)
        for kind in kinds
    }


def memory_kept(growths: dict[tuple[str, int], float]) -> float:
    """What the stream's memory differs by between its sizes, in units of what the additional
    images weigh decoded: 0 is flat, 1 is keeping them all.
    """
    streams = {images: growth for (loader, images), growth in growths.items() if loader == "stream"}
    additional_mb = (max(streams) - min(streams)) * SIZE * SIZE * 3 / 1e6
    return (max(streams.values()) - min(streams.values())) / additional_mb


class Stopwatch:
    """Counts the seconds inside the functions it wraps, by name, each second once: what one
    wrapped function spends in another is the other's.
    """

    def __init__(self) -> None:
        """Nothing counted yet."""
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.nested: list[float] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, clocked under `name`."""

        # Keras looks at attributes of callbacks' methods: wraps copies them
        @functools.wraps(function)
        def clocked(*arguments: Any, **named: Any) -> Any:
            self.nested.append(0.0)
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                elapsed = time.perf_counter() - started
                self.seconds[name] += elapsed - self.nested.pop()
                self.calls[name] += 1
                if self.nested:
                    self.nested[-1] += elapsed

        return clocked

    def wrap_callback(self, callback: Any) -> None:
        """Clock every method by which Keras calls `callback`."""
        for name in dir(callback):
            if name.startswith("on_"):
                clocked = self.wrap(type(callback).__name__, getattr(callback, name))
                setattr(callback, name, clocked)


@contextmanager
def clocked_fit(found: list[FitCost]) -> Iterator[None]:
    """Meanwhile every `fit` clocks all callbacks that it is given, and appends what it finds."""
    import keras

    from har.tracking.log import log

    plain_fit, watch = keras.Model.fit, Stopwatch()

    def fit(model: Any, *arguments: Any, **named: Any) -> Any:
        for callback in named["callbacks"]:
            watch.wrap_callback(callback)
        gaps, named["callbacks"] = Gaps(), list(named["callbacks"])
        cpu, started = monitor_cpu_s(), time.perf_counter()
        named["callbacks"].insert(0, gaps.build_callback())
        result = plain_fit(model, *arguments, **named)
        gaps.close()
        found.append(
            FitCost(
                fit_s=time.perf_counter() - started,
                inside_s=dict(watch.seconds),
                calls=dict(watch.calls),
                background_cpu_s=monitor_cpu_s() - cpu,
                disposal_s=gaps.seconds,
                epochs=len(result.epoch),
            )
        )
        return result

    log_epoch = watch.wrap("log_epoch (MLflow)", log.log_epoch)
    with (
        mock.patch.object(keras.Model, "fit", fit),
        mock.patch.object(log, "log_epoch", log_epoch),
    ):
        yield


class Gaps:
    """Seconds from each validation's end to its epoch's, and from the last epoch's to fit's.

    Keras does nothing there but forget iterators.
    """

    def __init__(self) -> None:
        """No gap is open."""
        self.seconds, self.since = 0.0, 0.0

    def open(self, logs: Any = None) -> None:
        """A gap starts."""
        self.since = time.perf_counter()

    def close(self, epoch: int = 0, logs: Any = None) -> None:
        """It ends; without validation there was none."""
        if self.since:
            self.seconds += time.perf_counter() - self.since
        self.since = 0.0

    def build_callback(self) -> Any:
        """For `fit`, as the first of its callbacks."""
        import keras

        callback = keras.callbacks.Callback()
        callback.on_test_end, callback.on_epoch_end = self.open, self.close
        callback.on_train_end = self.open
        return callback


def monitor_cpu_s() -> float:
    """CPU seconds so far of MLflow's thread that samples the machine; macOS does not tell: 0."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    (thread,) = (each for each in threading.enumerate() if each.name == "SystemMetricsMonitor")
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def measure_callbacks(manifest: Manifest, epochs: int) -> FitCost:
    """Train v3 on EfficientNet-Lite0 as `har run` does, into a store that is then deleted."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        os.environ["MLFLOW_TRACKING_URI"] = uri
        # else this would join the run of an `mlflow run` that started it
        os.environ.pop("MLFLOW_RUN_ID", None)
        import mlflow

        from har.jobs.train import build_job, run_training

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(uri)
        # the default would be mlruns/ in the working folder
        mlflow.create_experiment("benchmark", artifact_location=f"{folder}/artifacts")
        # the backbone whose steps are the shortest: there callbacks weigh the most
        recipe = replace(V3, backbone="efficientnet-lite0", epochs=epochs)
        job = build_job("v3", recipe, ("backbone", "epochs"), manifest)
        found: list[FitCost] = []
        with clocked_fit(found):
            run_training(job, "benchmark", time.time())
    (cost,) = found
    assert cost.calls["log_epoch (MLflow)"] == cost.epochs
    return cost


def build_bars(
    speeds: dict[str, list[Pass]], growths: dict[tuple[str, int], float], cost: FitCost
) -> list[Bar]:
    """Every claim with what was measured."""
    ours = speeds["stream"]
    return [
        Bar(
            claim="stream / bare tf.data loop, images a second",
            measured=paired_ratio(ours, speeds["bare tf.data loop"]),
            bound=STREAM_TO_BARE_LOOP,
            at_least=True,
        ),
        Bar(
            claim="stream / PIL loop, images a second",
            measured=paired_ratio(ours, speeds["PIL loop"]),
            bound=STREAM_TO_PIL_LOOP,
            at_least=True,
        ),
        Bar(
            claim="stream's memory, share of images that it keeps",
            measured=memory_kept(growths),
            bound=MEMORY_KEPT,
            at_least=False,
        ),
        Bar(
            claim="callbacks and logging / fit, seconds",
            measured=cost.share,
            bound=CALLBACK_SHARE,
            at_least=False,
        ),
    ]


def speed_lines(speeds: dict[str, list[Pass]]) -> list[str]:
    """Medians; the ratio is the one within a turn."""
    lines = ["", f"{'speed':<32}{'images/s':>12}{'CPU s/1,000':>14}{'to bare loop':>14}"]
    bare = speeds["bare tf.data loop"]
    for name, passes in speeds.items():
        rate = statistics.median(each.images_per_second for each in passes)
        cpu = statistics.median(1000 * each.cpu_s / each.images for each in passes)
        lines.append(f"{name:<32}{rate:>12,.0f}{cpu:>14.2f}{paired_ratio(passes, bare):>14.2f}")
    passes = list(itertools.chain(*speeds.values()))
    others = statistics.median(each.others for each in passes)
    disposal = max(each.disposal_s for each in passes)
    return [
        *lines,
        f"other processes took {others:.0%} of the machine meanwhile",
        f"not counted: up to {disposal:.1f} s a pass for TensorFlow to drop its iterator",
    ]


def memory_lines(growths: dict[tuple[str, int], float]) -> list[str]:
    """Growth by loader and number of images."""
    lines = ["", f"{'memory':<32}{'images':>12}{'growth MB':>14}"]
    for (loader, images), growth in growths.items():
        lines.append(f"{'loader ' + loader:<32}{images:>12,}{growth:>14.1f}")
    return lines


def callback_lines(cost: FitCost) -> list[str]:
    """Seconds inside each of our callbacks, and fit's own."""
    lines = ["", f"{'callbacks':<32}{'calls':>12}{'seconds':>14}{'of fit':>14}"]
    rows = [(name, cost.calls[name], spent) for name, spent in cost.inside_s.items()]
    rows.append(("system metrics thread, CPU", "", cost.background_cpu_s))
    rows.append(("(TensorFlow dropping iterators)", "", cost.disposal_s))
    rows.append((f"fit, {cost.epochs} epochs", "", cost.fit_s))
    for name, calls, spent in rows:
        lines.append(f"{name:<32}{calls:>12}{spent:>14.3f}{spent / cost.fit_s:>14.2%}")
    return lines


def measure(manifest: Manifest, repetitions: int, epochs: int) -> tuple[dict[str, Any], list[Bar]]:
    """Run the three parts one after the other, print the tables; what to write, and the bars."""
    machine = find_machine()
    speeds = in_fresh_process(measure_speed, manifest, repetitions)
    memories = measure_memories(manifest, min(repetitions, 3))
    say("callbacks: training")
    cost = in_fresh_process(measure_callbacks, manifest, epochs)
    growths = median_growth(memories)
    bars = build_bars(speeds, growths, cost)
    head = (
        f"{len(manifest.table):,} images of {manifest.name}, {SIZE} px; {machine['cpu']},"
        f" {machine['cores']} cores; TensorFlow {machine['tensorflow']}"
    )
    tables = (speed_lines(speeds), memory_lines(growths), callback_lines(cost), bar_lines(bars))
    click.echo("\n".join([head, *itertools.chain(*tables)]))
    found = {
        "machine": machine,
        "images": len(manifest.table),
        "dataset_digest": manifest.dataset_digest,
        "speed": {name: [asdict(each) for each in passes] for name, passes in speeds.items()},
        "memory": [asdict(each) for each in memories],
        "callbacks": asdict(cost) | {"share": cost.share},
    }
    return found, bars


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, help="folder of images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "input_pipeline.json", show_default=True)
@click.option("--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=2, show_default=True)
def main(data: str, out: Path, repetitions: int, epochs: int) -> None:
    """Measure, print, write, evaluate."""
    manifest = first_images(load_images(data), MOST_IMAGES)
    found, bars = measure(manifest, repetitions, epochs)
    finish(out, found, bars)


if __name__ == "__main__":
    main()
