"""What `mlflow models serve` runs. MLflow copies this file and the package `har` into the
model, and loads them from there: the server needs no checkout of this project.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext

from har.classifier import CLASSIFIER_FOLDER, Classifier, load_classifier


class ServedClassifier(PythonModel):  # type: ignore[misc]
    """One binary column `image` in; label, probability, top_3 and error out, a row each."""

    classifier: Classifier

    def load_context(self, context: PythonModelContext) -> None:
        """Read the classifier once, when the server starts."""
        self.classifier = load_classifier(Path(context.artifacts[CLASSIFIER_FOLDER]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None
    ) -> list[dict[str, Any]]:
        """Dicts and not a table: a missing value in a table leaves as NaN, which is no JSON."""
        return self.classifier.classify(model_input["image"].tolist())


mlflow.models.set_model(ServedClassifier())
