"""A trained classifier into the store, as a model for `mlflow models serve`."""

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

from har.classifier import CLASSIFIER_FOLDER, Classifier, read_facts
from har.errors import UserError, first_line
from har.manifest import Manifest
from har.runtimes import RUNTIMES

MODEL_NAME = "model"
# The first calls trace and allocate.
WARM_UP_CALLS = 5
TIMED_CALLS = 50
# Enough of a slow model: B7 takes a tenth of a second.
TIMED_S = 2.0
PACKAGE = Path(__file__).parent
# What every served model imports, and no more; its runtime may add to it.
SERVING_PACKAGES = ("mlflow", "tensorflow", "keras", "numpy", "pandas", "pillow")

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "label", required=False),
            ColSpec(DataType.double, "probability", required=False),
            ColSpec(
                Array(
                    Object(
                        [
                            Property("label", DataType.string),
                            Property("probability", DataType.double),
                        ]
                    )
                ),
                "top_3",
            ),
            ColSpec(DataType.string, "error", required=False),
        ]
    ),
)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a logged model takes for one image, decoding included, in milliseconds; the
    field names are the logged metric names.
    """

    latency_ms: float
    latency_p95_ms: float


def load_served(uri: str) -> tuple[Any, Classifier]:
    """The model as a server has it, read back from the store, and the classifier inside.

    Raises:
        UserError: MLflow cannot load it, or will not, since it is a pickle.
    """
    try:
        model = mlflow.pyfunc.load_model(uri)
    except MlflowException as error:
        raise UserError(f"{uri} cannot be loaded: {first_line(error)}") from error
    return model, model.unwrap_python_model().classifier


def measure_latency(model: Any, manifest: Manifest) -> Latency:
    """Median and 95th percentile over test images, each in a call of its own, of a served model
    called as a server calls it, without HTTP.
    """
    times = []
    enough = time.perf_counter() + TIMED_S
    for path in manifest.rows("test")["path"].head(WARM_UP_CALLS + TIMED_CALLS):
        request = pd.DataFrame({"image": [(manifest.root / path).read_bytes()]})
        started = time.perf_counter()
        model.predict(request)
        times.append(1000 * (time.perf_counter() - started))
        if time.perf_counter() > enough and len(times) > 2 * WARM_UP_CALLS:
            break
    # of very few images the first calls count too
    timed = times[min(WARM_UP_CALLS, len(times) - 1) :]
    median, p95 = np.percentile(timed, (50, 95))
    return Latency(latency_ms=float(median), latency_p95_ms=float(p95))


def log_classifier(folder: Path) -> str:
    """The classifier in `folder` as a model for `mlflow models serve`; returns its model id.

    MLflow keeps the folder under its own name: it must be called CLASSIFIER_FOLDER.
    """
    assert folder.name == CLASSIFIER_FOLDER
    facts = read_facts(folder)
    packages = SERVING_PACKAGES + RUNTIMES[facts["runtime"]].packages
    model = mlflow.pyfunc.log_model(
        name=MODEL_NAME,
        python_model=str(PACKAGE / "serving.py"),
        artifacts={CLASSIFIER_FOLDER: str(folder)},
        code_paths=[str(PACKAGE)],
        signature=SIGNATURE,
        # the very versions that judged it; the CPU build, which also serves
        pip_requirements=[f"{name}=={version(name)}" for name in packages],
        metadata={
            "class_names": facts["class_names"],
            "runtime": facts["runtime"],
        },
    )
    return str(model.model_id)
