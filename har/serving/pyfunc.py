"""The model that `mlflow models serve` runs. MLflow copies this file and the package `har` into
the logged model and loads them from there: a server needs no checkout of this project.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext, scoring_server

from har.data.limits import SERVED_REQUEST, SERVING_LIMITS, UNLIMITED, RequestLimits
from har.inference.classifier import (
    CLASSIFIER_FOLDER,
    Classifier,
    Prediction,
    explain_failure,
    load_classifier,
)
from har.inference.runtimes import hide_modules
from har.serving.bodies import COLUMN, check_rows, read_bodies_of
from har.serving.cells import read_cell
from har.serving.inputs import read_inputs_of_ours

logger = logging.getLogger("har.serving")
UNEXPECTED = "this image could not be classified; the server's log says why"
# Requests that MLflow's server works on at a time; asyncio's default is four and one for each CPU.
# Most of them wait for their turn.
SERVER_THREADS = 64


class ServedClassifier(PythonModel):  # type: ignore[misc]
    """Maps a table with one binary column `image` to one `Prediction` for each row."""

    classifier: Classifier
    limits: RequestLimits = UNLIMITED

    def load_context(self, context: PythonModelContext) -> None:
        """Load the classifier and warm it up, so that a server that answers is ready."""
        # Keras imports both where they are installed, for functions that no server calls: a second
        # of CPU time and 80 MB.
        with hide_modules("matplotlib", "sklearn"):
            classifier = load_classifier(Path(context.artifacts[CLASSIFIER_FOLDER]))
        # a client's image must not cost what an image of the user's own may
        self.classifier = replace(classifier, limits=SERVING_LIMITS)
        self.classifier.warm()
        # Spark and `mlflow models predict` pass tables of any length
        if "mlflow.pyfunc.scoring_server.app" in sys.modules:
            self.limits = SERVED_REQUEST
            _widen_server()
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
            answers = self.classifier.classify(files, read_cell, self.limits)
        # MLflow would send our stack trace to the client
        except Exception:
            logger.exception("%d images could not be classified", len(cells))
            return [explain_failure(UNEXPECTED) for _ in cells]
        pairs = zip(rows_of.values(), answers, strict=True)
        answer_of = {row: answer for rows, answer in pairs for row in rows}
        return [answer_of[row] for row in range(len(cells))]


def _is_ours(metadata: Any) -> bool:
    return "class_names" in (metadata.metadata or {})


def _widen_server() -> None:
    threads = ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="request")

    async def to_thread(work: Callable[..., Any], *arguments: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, partial(work, *arguments))

    # MLflow calls asyncio.to_thread, whose threads cannot be set before its event loop runs
    scoring_server.asyncio = SimpleNamespace(**{**vars(asyncio), "to_thread": to_thread})


mlflow.models.set_model(ServedClassifier())
