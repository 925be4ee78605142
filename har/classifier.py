"""A trained classifier on disk and in memory: bytes of images in, labels out.

The folder holds `model.keras` (float32, one device) and `classifier.json` (class names and
recipe): all that is needed to decode an image as training did and to name what it shows.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from har.errors import UserError, first_line
from har.images import ImageError, Pixels, decode
from har.recipe import Recipe

CLASSIFIER_FOLDER = "classifier"
MODEL_FILE = "model.keras"
FACTS_FILE = "classifier.json"
TOP_K = 3
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """`forward` maps (batch, size, size, 3) uint8 to (batch, classes) float32 probabilities."""

    forward: Any
    class_names: tuple[str, ...]
    recipe: Recipe

    def probabilities(self, images: Pixels) -> npt.NDArray[np.float32]:
        """(images, classes), from decoded images."""
        parts = [
            self.forward(images[start : start + BATCH_SIZE]).numpy()
            for start in range(0, len(images), BATCH_SIZE)
        ]
        return np.concatenate(parts or [np.empty((0, len(self.class_names)), np.float32)])

    def classify(self, files: Sequence[Any]) -> list[dict[str, Any]]:
        """One row a file's bytes: label, probability, top_3, error.

        `error` is None, or says why this file has no label; its neighbours are not touched.
        `top_3` is a list of {label, probability}, the most probable first.
        """
        images: list[Pixels] = []
        errors: list[str | None] = []
        for data in files:
            try:
                images.append(self.decode(data))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        rows = iter(self.probabilities(np.stack(images)) if images else ())
        return [self.describe(None if error else next(rows), error) for error in errors]

    def decode(self, data: Any) -> Pixels:
        """Bytes to pixels, as in training."""
        if not isinstance(data, bytes):
            raise ImageError(f"not bytes but {type(data).__name__}")
        return decode(data, self.recipe.resize, self.recipe.image_size)

    def describe(self, row: npt.NDArray[np.float32] | None, error: str | None) -> dict[str, Any]:
        """One image's output row, of plain Python values."""
        if row is None:
            return {"label": None, "probability": None, "top_3": [], "error": error}
        best = np.argsort(-row, kind="stable")[:TOP_K]
        top = [{"label": self.class_names[i], "probability": float(row[i])} for i in best]
        return {**top[0], "top_3": top, "error": None}


def build_forward(model: keras.Model) -> Any:
    """The model's inference as one compiled function that no batch size traces anew."""
    size = model.input_shape[1]
    signature = tf.TensorSpec((None, size, size, 3), tf.uint8)
    return tf.function(lambda images: model(images, training=False), input_signature=[signature])


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
