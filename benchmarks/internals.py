"""All inner functions of `har` that benchmarks call. Everything else runs the user's commands.

Importing this loads TensorFlow: import it in the functions that run in a fresh process.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pandas as pd

from har.util.progress import quiet_loading

with quiet_loading():
    import keras
    import tensorflow as tf
    from keras import layers

from har.data.manifest import Manifest
from har.inference.runtimes import RUNTIMES, build_function, choose_arithmetic, run_batches
from har.models.backbones import build_backbone as build_backbone
from har.models.build import build_model, compile_model
from har.models.devices import make_deterministic
from har.recipe import Recipe
from har.serving.load import load_logged_model
from har.training import loaders
from har.training.features import Extraction
from har.util.hardware import available_cpus

Images = npt.NDArray[Any]


def build_epoch(manifest: Manifest, recipe: Recipe) -> Any:
    """Build one epoch of training data from all images of the manifest."""
    make_deterministic()
    inputs = loaders.image_inputs(manifest, manifest.table, recipe, recipe.image_size)
    return loaders.build_training_dataset(inputs, manifest, manifest.table, recipe)


def take_first_batch(manifest: Manifest, recipe: Recipe) -> None:
    """Split the training images, build their stream as a training does, and take one batch."""
    splits = loaders.split_training(manifest, recipe)
    inputs = loaders.image_inputs(manifest, splits.train, recipe, recipe.source_size)
    next(iter(loaders.build_training_dataset(inputs, manifest, splits.train, recipe)))


def read_images(manifest: Manifest, rows: pd.DataFrame, recipe: Recipe) -> Images:
    """Decode the images of `rows` into one (rows, size, size, 3) uint8 array."""
    return loaders.read_images(manifest, rows, recipe).numpy()


def build_fit(
    manifest: Manifest, recipe: Recipe, steps: int, epochs: int, steps_per_execution: int
) -> tuple[Callable[[], Any], int]:
    """Build a short `fit` as a training runs it; count its images, validation included."""
    make_deterministic()
    splits = loaders.split_training(manifest, recipe)
    model = build_model(recipe, len(manifest.class_names))
    compile_model(model, recipe, steps_per_execution)
    train, validation = (
        loaders.image_inputs(manifest, rows, recipe, recipe.image_size)
        for rows in (splits.train, splits.validation)
    )
    data = {
        "x": loaders.build_training_dataset(train, manifest, splits.train, recipe),
        "validation_data": loaders.build_validation_dataset(
            validation, manifest, splits.validation, recipe
        ),
    }
    numbers = {"steps_per_epoch": steps, "epochs": epochs, "shuffle": False, "verbose": 0}
    images = epochs * (steps * recipe.batch_size + len(splits.validation))
    return lambda: model.fit(**data, **numbers), images


@contextmanager
def tuned_by_tensorflow() -> Iterator[None]:
    """Let TensorFlow choose how many images pipelines decode and prefetch, as is usual."""
    auto = tf.data.AUTOTUNE
    with (
        mock.patch.object(loaders, "available_cpus", lambda: auto),
        mock.patch.object(loaders, "prefetch", lambda dataset: dataset.prefetch(auto)),
    ):
        yield


def build_graphs(recipe: Recipe, classes: int) -> dict[str, Callable[[Images], Any]]:
    """Build the forward pass of uint8 images as Keras calls it, and as the frozen graph."""
    model = build_model(recipe, classes)
    return {
        "Keras' graph": tf.function(lambda images: model(images, training=False)),
        "frozen graph": build_function(model, "uint8"),
    }


def build_forward(recipe: Recipe, runtime: str) -> Callable[[Images], None]:
    """Compile a backbone as for features of training images; the result takes float32 images."""
    converted = RUNTIMES[runtime].convert(build_backbone(recipe))
    arithmetic = choose_arithmetic(runtime, recipe.precision, exact=False)
    compiled = RUNTIMES[runtime].compile(converted, arithmetic)
    size = compiled.batch_size

    def forward(images: Images) -> None:
        starts = range(0, len(images), size)
        batches = ((n, images[n : n + size]) for n in starts)
        run_batches(compiled, batches, lambda start, found: None)

    return forward


def count_multiplications(network: Any) -> int:
    """Count the multiplications of an image's forward pass in convolutions, dense layers and
    attention, which papers call FLOPs.
    """
    total = 0
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            total += count_multiplications(layer)
        elif isinstance(layer, layers.DepthwiseConv2D):
            # each output needs one input channel's window
            total += math.prod(layer.output.shape[1:]) * math.prod(layer.kernel_size)
        elif isinstance(layer, layers.Conv2D | layers.Dense):
            # a kernel's last axis is the output's channels
            total += math.prod(layer.output.shape[1:]) * math.prod(layer.kernel.shape[:-1])
        elif isinstance(layer, layers.MultiHeadAttention):
            (asked, width), (told, _) = (each.shape[1:] for each in layer.input)
            # four projections, then each token asked compares and averages all that it is told
            total += 2 * (asked + told) * width**2 + 2 * asked * told * width
    return total


def build_extraction(
    manifest: Manifest, recipe: Recipe, runtime: str
) -> Callable[[pd.DataFrame], Images]:
    """Build the extraction of training images' features, each time with an empty cache."""
    extraction = Extraction(build_backbone(recipe), manifest, recipe, runtime)

    def extract(rows: pd.DataFrame) -> Images:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["HAR_CACHE"] = folder
            return extraction.features(rows)

    return extract


def load_bare(uri: str) -> tuple[Callable[[Sequence[bytes]], Images], Callable[[Images], Any]]:
    """Load a logged model as two functions: decode, in as many threads as a server, and forward."""
    classifier = load_logged_model(uri).classifier
    classifier.warm()
    threads = ThreadPoolExecutor(available_cpus())

    def decode(files: Sequence[bytes]) -> Images:
        return np.stack(list(threads.map(classifier.decode, files)))

    return decode, classifier.forward
