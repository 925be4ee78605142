"""Where the time of a training epoch goes, and what each way to shorten it is worth.

    python benchmarks/training_epoch.py --data DIR

v3 on EfficientNet-Lite0, on images of DIR (a folder that `har run --data` takes): the epoch as it
is; with one thing changed at a time (decoded images kept in memory, several steps in one
execution, no augmentation); and the forward pass alone over a ready batch, as Keras calls it in
training and as the frozen graph that evaluation and serving use. All take turns in one process, so
that a busy machine disturbs them alike; a ratio is the median of the ratios within a turn.

Prints a table and writes JSON. It has no bars: it says what is worth doing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from har.manifest import Manifest
from har.progress import say
from har.recipe import VARIANTS, Recipe
from measuring import RESULTS, find_machine, finish, in_fresh_process, load_images

V3 = replace(VARIANTS["v3"], backbone="efficientnet-lite0", strategy="one_device", epochs=1000)
STEPS = 40
AS_IT_IS = "v3 as it is"
# What is changed in the recipe, and steps in one execution.
EPOCHS: dict[str, tuple[Recipe, int]] = {
    AS_IT_IS: (V3, 1),
    "decoded images kept in memory": (replace(V3, loader="memory"), 1),
    "10 steps in one execution": (V3, 10),
    "no augmentation": (replace(V3, augmentation="none"), 1),
}

Call = Callable[[], Any]


def build_epoch(manifest: Manifest, recipe: Recipe, steps_per_execution: int) -> Call:
    """STEPS training steps, as `har run` does them."""
    from har.model import compile_model
    from har.pipeline import split_training
    from har.training import prepare_images

    lesson = prepare_images(recipe, manifest, split_training(manifest, recipe), "tensorflow")
    compile_model(lesson.learner, recipe, steps_per_execution)
    return lambda: lesson.learner.fit(
        lesson.train_data, steps_per_epoch=STEPS, shuffle=False, verbose=0
    )


def build_forwards(manifest: Manifest) -> dict[str, Call]:
    """The forward pass of as many images: unchanged, and as the frozen graph."""
    import numpy as np
    import tensorflow as tf

    from har.model import build_model
    from har.runtimes import compile_tensorflow

    model = build_model(V3, len(manifest.class_names))
    images = np.zeros((V3.batch_size, V3.image_size, V3.image_size, 3), np.uint8)
    keras_graph = tf.function(lambda x: model(x, training=False))
    frozen = compile_tensorflow(model)
    return {
        "forward pass alone, Keras' graph": lambda: [keras_graph(images) for _ in range(STEPS)],
        "forward pass alone, frozen graph": lambda: [frozen(images) for _ in range(STEPS)],
    }


def take_turns(manifest: Manifest, turns: int) -> dict[str, list[float]]:
    """Seconds of each; a first turn, which traces, is not counted."""
    from har.devices import make_deterministic

    make_deterministic()
    calls = {name: build_epoch(manifest, *each) for name, each in EPOCHS.items()}
    calls |= build_forwards(manifest)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        say(f"turn {turn} of {turns}")
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: found[1:] for name, found in seconds.items()}


def table(seconds: dict[str, list[float]]) -> list[str]:
    """Images a second, and how many times as many as the epoch as it is."""
    lines = [f"{'Lite0 at 160 px':<36}{'images/s':>10}{'to v3':>8}"]
    for name, found in seconds.items():
        rate = STEPS * V3.batch_size / statistics.median(found)
        pairs = zip(seconds[AS_IT_IS], found, strict=True)
        ratio = statistics.median(before / after for before, after in pairs)
        lines.append(f"{name:<36}{rate:>10.0f}{ratio:>8.2f}")
    return lines


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, help="folder of images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "training_epoch.json", show_default=True)
@click.option("--turns", type=click.IntRange(1), default=7, show_default=True)
def main(data: str, out: Path, turns: int) -> None:
    """Measure, print, write."""
    manifest = load_images(data)
    machine = find_machine()
    click.echo(f"{machine['cpu']}, {machine['cores']} cores; TensorFlow {machine['tensorflow']}")
    seconds = in_fresh_process(take_turns, manifest, turns)
    click.echo("\n".join(table(seconds)))
    finish(out, {"machine": machine, "seconds": seconds}, [])


if __name__ == "__main__":
    main()
