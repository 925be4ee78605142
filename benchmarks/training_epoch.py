"""Where the time of a training epoch goes, and what each way to shorten it is worth.

    python benchmarks/training_epoch.py --data DIR

v3 on EfficientNet-Lite0, on images of DIR (a folder that `har run --data` takes): a short `fit`
as `har run` does it; with one thing changed at a time (TensorFlow's autotuning of the input,
decoded images kept in memory, several steps in one execution, no augmentation); and the forward
pass alone over a ready batch, as Keras calls it in training and as the frozen graph that evaluation
and serving use. All take turns in one process, so that a busy machine disturbs them alike; a ratio
is the median of the ratios within a turn.

Prints a table and writes JSON. It has no bars: it says what is worth doing.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click

from har.data.manifest import Manifest
from har.recipe import VARIANTS, Recipe
from har.util.progress import say
from measuring import (
    RESULTS,
    find_machine,
    finish,
    first_images,
    in_fresh_process,
    load_images,
)

V3 = replace(VARIANTS["v3"], backbone="efficientnet-lite0", strategy="one_device", epochs=1000)
# Of a fit: so many training steps in each of two epochs, and all of validation after each.
STEPS, EPOCHS = 20, 2
MOST_IMAGES = 2000
AS_IT_IS = "v3 as it is"
AUTOTUNED = "input tuned by TensorFlow"
# What is changed in the recipe, and steps in one execution.
FITS: dict[str, tuple[Recipe, int]] = {
    AS_IT_IS: (V3, 1),
    AUTOTUNED: (V3, 1),
    "decoded images kept in memory": (replace(V3, loader="memory"), 1),
    "10 steps in one execution": (V3, 10),
    "no augmentation": (replace(V3, augmentation="none"), 1),
}

Call = Callable[[], Any]


def build_fit(manifest: Manifest, recipe: Recipe, steps_per_execution: int) -> Call:
    """Two short epochs, as `har run` does them."""
    from har.models.build import compile_model
    from har.training.loaders import split_training
    from har.training.train import build_image_inputs

    splits = split_training(manifest, recipe)
    lesson = build_image_inputs(recipe, manifest, splits, "tensorflow", first_epoch=0)
    compile_model(lesson.learner, recipe, steps_per_execution)
    return lambda: lesson.learner.fit(
        lesson.train_data,
        validation_data=lesson.validation_data,
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
    )


@contextmanager
def tuned_by_tensorflow() -> Iterator[None]:
    """Meanwhile pipelines are built as they usually are: TensorFlow finds out how much at once."""
    import tensorflow as tf

    from har.training import loaders

    with (
        mock.patch.object(loaders, "available_cpus", lambda: tf.data.AUTOTUNE),
        mock.patch.object(loaders, "prefetch", lambda dataset: dataset.prefetch(tf.data.AUTOTUNE)),
    ):
        yield


def build_forwards(manifest: Manifest, steps: int) -> dict[str, Call]:
    """The forward pass of so many batches: unchanged, and as the frozen graph."""
    import numpy as np
    import tensorflow as tf

    from har.inference.runtimes import compile_tensorflow
    from har.models.build import build_model

    model = build_model(V3, len(manifest.class_names))
    images = np.zeros((V3.batch_size, V3.image_size, V3.image_size, 3), np.uint8)
    keras_graph = tf.function(lambda x: model(x, training=False))
    frozen = compile_tensorflow(model, "uint8")
    return {
        "forward pass alone, Keras' graph": lambda: [keras_graph(images) for _ in range(steps)],
        "forward pass alone, frozen graph": lambda: [frozen(images) for _ in range(steps)],
    }


def take_turns(manifest: Manifest, turns: int) -> dict[str, list[float]]:
    """Seconds of each; a first turn, which traces, is not counted."""
    from har.models.devices import make_deterministic

    make_deterministic()
    calls = {}
    for name, (recipe, steps_per_execution) in FITS.items():
        with tuned_by_tensorflow() if name == AUTOTUNED else nullcontext():
            calls[name] = build_fit(manifest, recipe, steps_per_execution)
    calls |= build_forwards(manifest, images_of_fit(manifest) // V3.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        say(f"turn {turn} of {turns}")
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: found[1:] for name, found in seconds.items()}


def images_of_fit(manifest: Manifest) -> int:
    """Trained on and validated on, repetitions counted."""
    from har.training.loaders import split_training

    return EPOCHS * (STEPS * V3.batch_size + len(split_training(manifest, V3).validation))


def table(images: int, seconds: dict[str, list[float]]) -> list[str]:
    """Images a second, and how many times as many as the fit as it is."""
    lines = [f"{'Lite0 at 160 px':<36}{'images/s':>10}{'to v3':>8}"]
    for name, found in seconds.items():
        rate = images / statistics.median(found)
        pairs = zip(seconds[AS_IT_IS], found, strict=True)
        ratio = statistics.median(before / after for before, after in pairs)
        lines.append(f"{name:<36}{rate:>10.0f}{ratio:>8.2f}")
    return lines


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, help="folder of images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "training_epoch.json", show_default=True)
@click.option("--turns", type=click.IntRange(1), default=4, show_default=True)
def main(data: str, out: Path, turns: int) -> None:
    """Measure, print, write."""
    manifest = first_images(load_images(data), MOST_IMAGES)
    machine = find_machine()
    click.echo(f"{machine['cpu']}, {machine['cores']} cores; TensorFlow {machine['tensorflow']}")
    seconds = in_fresh_process(take_turns, manifest, turns)
    click.echo("\n".join(table(images_of_fit(manifest), seconds)))
    finish(out, {"machine": machine, "seconds": seconds}, [])


if __name__ == "__main__":
    main()
