"""The model that `mlflow models serve` runs. MLflow copies this file and the package `har` into
the logged model and loads them from there: a server needs no checkout of this project.
"""

import base64
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from har.data.images import ImageError
from har.data.limits import SERVING_LIMITS
from har.inference.classifier import (
    CLASSIFIER_FOLDER,
    Classifier,
    Prediction,
    explain_failure,
    load_classifier,
)
from har.inference.runtimes import hide_modules

logger = logging.getLogger("har.serving")
BASE64 = re.compile(rb"[A-Za-z0-9+/]+={0,2}")
UNEXPECTED = "this image could not be classified; the server's log says why"


def read_cell(cell: Any) -> bytes:
    """Get an image's bytes from what MLflow makes of a client's value: bytes, or base64 text."""
    if isinstance(cell, str):
        return _read_base64(cell.encode("ascii", errors="replace"))
    if not isinstance(cell, bytes):
        null = cell is None or (isinstance(cell, float) and math.isnan(cell))
        raise ImageError(f"neither bytes nor base64 but {'null' if null else type(cell).__name__}")
    # The strings of `inputs` and `instances` arrive as undecoded bytes. No image that we accept
    # consists of base64's characters only.
    if len(cell) % 4 == 0 and BASE64.fullmatch(cell):
        return _read_base64(cell)
    return cell


def _read_base64(text: bytes) -> bytes:
    most = SERVING_LIMITS.bytes
    if len(text) > most * 4 / 3 + 4:
        raise ImageError(f"{len(text):,} characters of base64: more than {most:,} bytes")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageError("not base64") from error


class ServedClassifier(PythonModel):  # type: ignore[misc]
    """Maps a table with one binary column `image` to one `Prediction` for each row."""

    classifier: Classifier

    def load_context(self, context: PythonModelContext) -> None:
        """Load the classifier and warm it up, so that a server that answers is ready."""
        # Keras imports both where they are installed, for functions that no server calls: a second
        # of CPU time and 80 MB.
        with hide_modules("matplotlib", "sklearn"):
            classifier = load_classifier(Path(context.artifacts[CLASSIFIER_FOLDER]))
        # a client's image must not cost what an image of the user's own may
        self.classifier = replace(classifier, limits=SERVING_LIMITS)
        self.classifier.warm()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None
    ) -> list[Prediction]:
        """Classify the images of a table."""
        # the answer is no table: that would turn missing values into NaN, which JSON does not have
        try:
            cells = model_input["image"].tolist()
        except Exception:
            raise MlflowException.invalid_parameter_value(
                "the input must be a table with one column, image"
            ) from None
        try:
            return self.classifier.classify(cells, read_cell)
        # MLflow would send our stack trace to the client
        except Exception:
            logger.exception("%d images could not be classified", len(cells))
            return [explain_failure(UNEXPECTED) for _ in cells]


mlflow.models.set_model(ServedClassifier())
