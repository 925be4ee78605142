"""What is recorded, read back: a logged model, and a run that is to be repeated."""

import tempfile
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
from har.tracking.records import read_split
from har.tracking.store import quiet_mlflow
from har.util.errors import UserError, first_line


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
        run=find_run(description.run_id),
    )


def find_run(run_id: str | None) -> mlflow.entities.Run | None:
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
            f" {logged.uri} was trained on: judge it on the split of its run"
            f" ({logged.split.as_options}), or on images it has not seen"
        )


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
