"""Logs a trained classifier as a model for `mlflow models serve`."""

import os
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

import har
from har.inference.classifier import CLASSIFIER_FOLDER, read_facts
from har.inference.runtimes import RUNTIMES
from har.tracking.query import MODEL_NAME
from har.tracking.store import neutral_tags

PACKAGE = Path(har.__file__).parent
# All that a served model imports; its runtime may add to it.
SERVING_PACKAGES = ("mlflow", "tensorflow", "keras", "numpy", "pandas", "pillow", "simplejpeg")
GUESS = Object([Property("label", DataType.string), Property("probability", DataType.double)])
OUTPUTS = [
    ColSpec(DataType.string, "label", required=False),
    ColSpec(DataType.double, "probability", required=False),
    ColSpec(Array(GUESS), "top_3"),
    ColSpec(DataType.string, "error", required=False),
]
SIGNATURE = ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema(OUTPUTS))


def log_classifier(folder: Path) -> str:
    """Log the classifier in `folder`; return its model id.

    MLflow keeps the folder's name, which must be CLASSIFIER_FOLDER.
    """
    assert folder.name == CLASSIFIER_FOLDER
    facts = read_facts(folder)
    packages = SERVING_PACKAGES + RUNTIMES[facts["runtime"]].packages
    model = mlflow.pyfunc.log_model(
        name=MODEL_NAME,
        python_model=str(PACKAGE / "serving" / "pyfunc.py"),
        # MLflow writes this path into the model: a relative one names no user
        artifacts={CLASSIFIER_FOLDER: os.path.relpath(folder)},
        code_paths=[str(PACKAGE)],
        signature=SIGNATURE,
        # the versions that evaluated it; the CPU build is enough to serve
        pip_requirements=[f"{name}=={version(name)}" for name in packages],
        tags=neutral_tags(),
        metadata={"class_names": facts["class_names"], "runtime": facts["runtime"]},
    )
    return str(model.model_id)
