"""A trained classifier into the store, as a model for `mlflow models serve`."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

import har
from har.inference.classifier import CLASSIFIER_FOLDER, read_facts
from har.inference.runtimes import RUNTIMES

MODEL_NAME = "model"
# Of the metadata of a model: which code it carries.
CODE_DIGEST = "code_sha256"
PACKAGE = Path(har.__file__).parent
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


@cache
def digest_code() -> str:
    """SHA-256 of the files of this package, which a model is logged with."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".html", ".toml"):
            found.update(path.relative_to(PACKAGE).as_posix().encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def log_classifier(folder: Path) -> str:
    """The classifier in `folder` as a model for `mlflow models serve`; returns its model id.

    MLflow keeps the folder under its own name: it must be called CLASSIFIER_FOLDER.
    """
    assert folder.name == CLASSIFIER_FOLDER
    facts = read_facts(folder)
    packages = SERVING_PACKAGES + RUNTIMES[facts["runtime"]].packages
    model = mlflow.pyfunc.log_model(
        name=MODEL_NAME,
        python_model=str(PACKAGE / "serving" / "pyfunc.py"),
        artifacts={CLASSIFIER_FOLDER: str(folder)},
        code_paths=[str(PACKAGE)],
        signature=SIGNATURE,
        # the very versions that evaluated it; the CPU build, which also serves
        pip_requirements=[f"{name}=={version(name)}" for name in packages],
        metadata={
            "class_names": facts["class_names"],
            "runtime": facts["runtime"],
            CODE_DIGEST: digest_code(),
        },
    )
    return str(model.model_id)
