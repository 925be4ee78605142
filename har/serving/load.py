"""What is recorded, read back: a logged model, and a run that is to be repeated."""

import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException

from har.data.manifest import TABLE_FILE, Manifest
from har.data.splits import Split
from har.inference.classifier import CLASSIFIER_FOLDER, Classifier, load_classifier
from har.serving.package import CODE_DIGEST, digest_code
from har.tracking.records import read_split
from har.tracking.store import quiet_mlflow
from har.util.errors import UserError, first_line

PROGRAM = Path(__file__).with_name("isolated.py")


@dataclass(frozen=True, kw_only=True)
class LoggedModel:
    """A model from the store and the run that trained it, if that can be told.

    `identity` tells apart what one `uri` may mean in time: an alias moves.
    """

    uri: str
    identity: str
    classifier: Classifier
    run: mlflow.entities.Run | None

    @property
    def split(self) -> Split:
        """How the training run held its test images out."""
        return read_split(self.run) if self.run else Split()


def load_logged_model(uri: str) -> LoggedModel:
    """The model at `runs:/ID/model`, `models:/...` or in a folder.

    Raises:
        UserError: no such model, or it was not logged by this project.
    """
    quiet_mlflow()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            local = mlflow.artifacts.download_artifacts(uri, dst_path=scratch)
            description = mlflow.models.Model.load(local)
        except (MlflowException, OSError) as error:
            raise UserError(f"no model at {uri}: {first_line(error)}") from error
        classifier = load_classifier(Path(local) / "artifacts" / CLASSIFIER_FOLDER)
    return LoggedModel(
        uri=uri,
        identity=str(description.model_uuid),
        classifier=classifier,
        run=_find_run(description.run_id),
    )


def _find_run(run_id: str | None) -> mlflow.entities.Run | None:
    """The run of that id, if this store has it."""
    try:
        return mlflow.get_run(run_id) if run_id else None
    except MlflowException:
        return None


def check_unseen(logged: LoggedModel, manifest: Manifest) -> None:
    """Raise a UserError if the model was trained on any of the manifest's test images."""
    if logged.run is None:
        return
    uri = f"runs:/{logged.run.info.run_id}/{TABLE_FILE}"
    trained = pd.read_csv(StringIO(mlflow.artifacts.load_text(uri)))
    seen = set(trained.loc[trained["split"] == "train", "sha256"])
    if known := int(manifest.rows("test")["sha256"].isin(seen).sum()):
        raise UserError(
            f"{known} of the {len(manifest.rows('test'))} test images are among those that"
            f" {logged.uri} was trained on: evaluate it on the split of its run"
            f" ({logged.split.as_options}), or on images it has not seen"
        )


def load_served(uri: str) -> tuple[Any, Classifier]:
    """The model as a server has it, read back from the store, and the classifier inside.

    Only for a model that carries this very code, such as one that was logged just now: any other is
    for `open_served`.

    Raises:
        UserError: MLflow cannot load it, or will not, since it is a pickle.
    """
    try:
        model = mlflow.pyfunc.load_model(uri)
    except MlflowException as error:
        raise UserError(f"{uri} cannot be loaded: {first_line(error)}") from error
    return model, model.unwrap_python_model().classifier


@contextmanager
def open_served(uri: str) -> Iterator[Any]:
    """Yield a model as a server has it: `predict` maps a table with the column image to rows.

    One that carries other code than this, such as an older version's, answers in a process of its
    own: two versions of `har` cannot be imported into one process.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    try:
        metadata = mlflow.models.get_model_info(uri).metadata or {}
    except (MlflowException, OSError) as error:
        raise UserError(f"no model at {uri}: {first_line(error)}") from error
    if metadata.get(CODE_DIGEST) == digest_code():
        yield load_served(uri)[0]
        return
    model = IsolatedModel(uri)
    try:
        yield model
    finally:
        model.close()


class IsolatedModel:
    """A model in a process of its own, which `isolated.py` runs with the code of the model."""

    def __init__(self, uri: str) -> None:
        """Start the process and wait until it has loaded the model.

        Raises:
            UserError: the model cannot be loaded.
        """
        stores = {
            "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
            "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
        }
        self.uri = uri
        self.process = subprocess.Popen(
            # -P: the folder of this file is no place to import from
            [sys.executable, "-P", str(PROGRAM), uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **stores},
            text=True,
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def predict(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """One row an image, as the model answers.

        Raises:
            UserError: the model raises an error, or its process ends.
        """
        images = [base64.b64encode(each).decode() for each in table["image"]]
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(images) + "\n")
            self.process.stdin.flush()
        rows: list[dict[str, Any]] = self._read()
        return rows

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if isinstance(answer, dict) and answer.get("error") is not None:
            why = str(answer["error"]).partition("\n")[0]
            raise UserError(f"{self.uri} cannot be loaded or fails: {why}")
        return answer
