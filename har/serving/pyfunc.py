"""What `mlflow models serve` runs. MLflow copies this file and the package `har` into the
model, and loads them from there: the server needs no checkout of this project.
"""

import base64
import logging
import math
import re
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from har.data.images import MAX_BYTES, ImageError
from har.inference.classifier import CLASSIFIER_FOLDER, Classifier, load_classifier
from har.inference.runtimes import hide_modules

logger = logging.getLogger("har.serving")
BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
UNEXPECTED = "this image could not be classified; the server's log says why"


def read_cell(cell: Any) -> bytes:
    """The image's bytes from what MLflow makes of a client's value: bytes, or base64 text.

    Raises:
        ImageError: neither.
    """
    if isinstance(cell, str):
        return _read_base64(cell.encode("ascii", errors="replace"))
    if not isinstance(cell, bytes):
        null = cell is None or (isinstance(cell, float) and math.isnan(cell))
        raise ImageError(f"neither bytes nor base64 but {'null' if null else type(cell).__name__}")
    # The strings of `inputs` and `instances` come undecoded, as bytes. No image of any kind we
    # accept consists of base64's letters alone.
    if len(cell) % 4 == 0 and BASE64.fullmatch(cell):
        return _read_base64(cell)
    return cell


def _read_base64(text: bytes) -> bytes:
    """What it stands for.

    Raises:
        ImageError: not base64 to the letter, or too long for an image.
    """
    if len(text) > MAX_BYTES * 4 / 3 + 4:
        raise ImageError(f"{len(text):,} characters of base64: more than {MAX_BYTES:,} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageError("not base64") from error


class ServedClassifier(PythonModel):  # type: ignore[misc]
    """One binary column `image` in; label, probability, top_3 and error out, a row each."""

    classifier: Classifier

    def load_context(self, context: PythonModelContext) -> None:
        """Read the classifier once and warm it: the server is ready when it says so."""
        # Keras imports both where it finds them, for functions that no server calls: a second of
        # CPU time and 80 MB.
        with hide_modules("matplotlib", "sklearn"):
            self.classifier = load_classifier(Path(context.artifacts[CLASSIFIER_FOLDER]))
        self.classifier.warm()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None
    ) -> list[dict[str, Any]]:
        """Dicts and not a table: a missing value in a table leaves as NaN, which is no JSON."""
        try:
            cells = model_input["image"].tolist()
        except Exception:
            raise MlflowException.invalid_parameter_value(
                "the input must be a table with one column, image"
            ) from None
        try:
            return self.classifier.classify(cells, read_cell)
        # MLflow would send the client our stack trace
        except Exception:
            logger.exception("%d images could not be classified", len(cells))
            return [self.classifier.describe(None, UNEXPECTED) for _ in cells]


mlflow.models.set_model(ServedClassifier())
