"""The model that `mlflow models serve` runs. MLflow copies this file and the package `har` into
the logged model and loads them from there: a server needs no checkout of this project.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from har.data.limits import SERVED_REQUEST, SERVING_LIMITS, UNLIMITED, RequestLimits
from har.inference.classifier import (
    CLASSIFIER_FOLDER,
    Classifier,
    Prediction,
    explain_failure,
    load_classifier,
)
from har.serving.admission import admit_requests, client_has_left
from har.serving.bodies import COLUMN, check_rows, read_bodies_of
from har.serving.cells import read_cell
from har.serving.inputs import read_inputs_of_ours
from har.serving.parquet import read_parquets_of_ours

logger = logging.getLogger("har.serving")
UNEXPECTED = "this image could not be classified; the server's log says why"


class ServedClassifier(PythonModel):  # type: ignore[misc]
    """Maps a table with one binary column `image` to one `Prediction` for each row."""

    classifier: Classifier
    limits: RequestLimits = UNLIMITED

    def load_context(self, context: PythonModelContext) -> None:
        """Load the classifier and warm it up, so that a server that answers is ready."""
        classifier = load_classifier(Path(context.artifacts[CLASSIFIER_FOLDER]))
        # a client's image must not cost what an image of the user's own may
        self.classifier = replace(classifier, limits=SERVING_LIMITS)
        self.classifier.warm()
        # Spark and `mlflow models predict` pass tables of any length
        if "mlflow.pyfunc.scoring_server.app" in sys.modules:
            self.limits = SERVED_REQUEST
            admit_requests(self.limits)
            read_parquets_of_ours(self.limits)
        read_bodies_of(_is_ours, self.limits)
        read_inputs_of_ours()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None
    ) -> list[Prediction]:
        """Classify the images of a table."""
        # the answer is no table: that would turn missing values into NaN, which JSON does not have
        try:
            cells = model_input[COLUMN].tolist()
        except Exception:
            raise MlflowException.invalid_parameter_value(
                "the input must be a table with one column, image"
            ) from None
        check_rows(len(cells), self.limits)
        # an image that is there several times is classified once
        rows_of: dict[Any, list[int]] = {}
        for row, cell in enumerate(cells):
            key = cell if isinstance(cell, str | bytes) else (row,)
            rows_of.setdefault(key, []).append(row)
        files = [cells[rows[0]] for rows in rows_of.values()]
        try:
            answers = self.classifier.classify(files, read_cell, self.limits, client_has_left())
        # MLflow would send our stack trace to the client
        except Exception:
            logger.exception("%d images could not be classified", len(cells))
            return [explain_failure(UNEXPECTED) for _ in cells]
        pairs = zip(rows_of.values(), answers, strict=True)
        answer_of = {row: answer for rows, answer in pairs for row in rows}
        return [answer_of[row] for row in range(len(cells))]


def _is_ours(metadata: Any) -> bool:
    return "class_names" in (metadata.metadata or {})


mlflow.models.set_model(ServedClassifier())
