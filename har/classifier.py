"""A trained classifier on disk and in memory: bytes of images in, labels out.

The folder holds `model.keras` (float32, one device) and `classifier.json` (class names and
recipe): all that is needed to decode an image as training did and to name what it shows.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from har.errors import UserError, first_line
from har.images import RESIZERS, ImageError, Pixels, decode
from har.recipe import Recipe

CLASSIFIER_FOLDER = "classifier"
MODEL_FILE = "model.keras"
FACTS_FILE = "classifier.json"
TOP_K = 3
# A batch is filled up to one of these: few shapes, for each of which TensorFlow prepares once.
BUCKETS = (1, 2, 4, 8, 16, 32)
BATCH_SIZE = BUCKETS[-1]
# Weights as constants are a third faster, but take many times their size while it is done:
# seconds for Lite0 (3 million), 40 seconds and 7 GB for B7 (64 million).
MOST_CONSTANTS = 25_000_000


@functools.cache
def decoders() -> ThreadPoolExecutor:
    """The threads that decode, one a processor, for all callers together: that many images at
    most lie decoded in full size. Pillow lets other threads run while it decodes.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cpus, thread_name_prefix="decode")


@dataclass(frozen=True, kw_only=True)
class Forward:
    """(batch, size, size, 3) uint8, at most BATCH_SIZE images, to (batch, classes) float32
    probabilities: one compiled function, traced once, run in the shapes of BUCKETS.
    """

    compiled: Any

    def __call__(self, images: Any) -> Any:
        """Filled up with black images to a bucket; their rows are dropped."""
        count = len(images)
        bucket = next(each for each in BUCKETS if each >= count)
        if bucket == count:
            return self.compiled(images)
        filled = np.zeros((bucket, *images.shape[1:]), np.uint8)
        filled[:count] = images
        return self.compiled(filled)[:count]


def expect_bytes(data: Any) -> bytes:
    """The file itself.

    Raises:
        ImageError: it is of another type.
    """
    if not isinstance(data, bytes):
        raise ImageError(f"not bytes but {type(data).__name__}")
    return data


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """`forward` maps (batch, size, size, 3) uint8 to (batch, classes) float32 probabilities."""

    forward: Any
    class_names: tuple[str, ...]
    recipe: Recipe

    def warm(self) -> None:
        """Do once what a first call of each kind would have to wait for."""
        size = self.recipe.image_size
        RESIZERS[self.recipe.resize](np.zeros((2, 2, 3), np.uint8), size)
        self.classify([b"no image: now every image plugin is loaded"])
        for bucket in BUCKETS:
            self.probabilities(np.zeros((bucket, size, size, 3), np.uint8))

    def probabilities(self, images: Pixels) -> npt.NDArray[np.float32]:
        """(images, classes), from decoded images."""
        parts = [
            self.forward(images[start : start + BATCH_SIZE]).numpy()
            for start in range(0, len(images), BATCH_SIZE)
        ]
        return np.concatenate(parts or [np.empty((0, len(self.class_names)), np.float32)])

    def classify(
        self, files: Sequence[Any], read: Callable[[Any], bytes] = expect_bytes
    ) -> list[dict[str, Any]]:
        """One row a file: label, probability, top_3, error.

        `read` turns an element of `files` into the bytes of an image, or raises an ImageError.
        `error` is None, or says why this file has no label; its neighbours are not touched.
        `top_3` is a list of {label, probability}, the most probable first.
        """
        rows = []
        for start in range(0, len(files), BATCH_SIZE):
            rows += self.classify_batch(files[start : start + BATCH_SIZE], read)
        return rows

    def classify_batch(
        self, files: Sequence[Any], read: Callable[[Any], bytes]
    ) -> list[dict[str, Any]]:
        """`classify`, with as many decoded images in memory as there are files."""

        def decode_or_say(data: Any) -> Pixels | str:
            try:
                return self.decode(read(data))
            except ImageError as error:
                return str(error)

        found = list(decoders().map(decode_or_say, files))
        images = [each for each in found if not isinstance(each, str)]
        rows = iter(self.probabilities(np.stack(images)) if images else ())
        return [
            self.describe(None, each) if isinstance(each, str) else self.describe(next(rows), None)
            for each in found
        ]

    def decode(self, data: bytes) -> Pixels:
        """Bytes to pixels, as in training."""
        return decode(data, self.recipe.resize, self.recipe.image_size)

    def describe(self, row: npt.NDArray[np.float32] | None, error: str | None) -> dict[str, Any]:
        """One image's output row, of plain Python values."""
        # NaN is no JSON
        if row is not None and not np.isfinite(row).all():
            row, error = None, "the model's numbers are not finite: its training went wrong"
        if row is None:
            return {"label": None, "probability": None, "top_3": [], "error": error}
        best = np.argsort(-row, kind="stable")[:TOP_K]
        top = [{"label": self.class_names[i], "probability": float(row[i])} for i in best]
        return {**top[0], "top_3": top, "error": None}


def build_forward(model: keras.Model) -> Forward:
    """The model's inference, compiled; up to MOST_CONSTANTS weights become constants of the
    graph, so that TensorFlow merges batch normalisation into convolutions.
    """
    size = model.input_shape[1]
    signature = tf.TensorSpec((None, size, size, 3), tf.uint8)
    compiled = tf.function(
        lambda images: model(images, training=False), input_signature=[signature]
    )
    if model.count_params() > MOST_CONSTANTS:
        return Forward(compiled=compiled)
    frozen = convert_variables_to_constants_v2(compiled.get_concrete_function())
    return Forward(
        compiled=tf.function(lambda images: frozen(images)[0], input_signature=[signature])
    )


def save_classifier(
    folder: Path, model: keras.Model, class_names: tuple[str, ...], recipe: Recipe
) -> None:
    """Write both files into `folder`, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / MODEL_FILE)
    facts = {"class_names": class_names, "recipe": asdict(recipe)}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2), encoding="utf-8")


def load_classifier(folder: Path) -> Classifier:
    """Read what `save_classifier` wrote; Keras' safe mode runs no code from the file.

    Raises:
        UserError: the folder does not hold a classifier.
    """
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        model = keras.models.load_model(folder / MODEL_FILE, compile=False)
        return Classifier(
            forward=build_forward(model),
            class_names=tuple(facts["class_names"]),
            recipe=Recipe(**facts["recipe"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no classifier that this version can read: {first_line(error)}"
        ) from error
