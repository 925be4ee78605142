"""Loads logged models: their files only, never the code that they carry."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException

from har.data.manifest import Manifest
from har.data.splits import Split
from har.inference.classifier import CLASSIFIER_FOLDER, Classifier, Prediction, load_classifier
from har.serving.pyfunc import ServedClassifier
from har.tracking.artifacts import UNREADABLE, open_model
from har.tracking.query import WHOLE_RUN_ID, complete_model_uri, load_image_table
from har.tracking.records import read_split
from har.tracking.store import quiet_mlflow
from har.tracking.tags import FROM_TAG, ORIGIN_TAG
from har.util.errors import UserError, first_line
from har.util.files import read_regular_file
from har.util.garbage import collect_garbage_later
from har.util.progress import say

MODEL_FILE = "MLmodel"
_WAYS = "a model is named by models:/har@champion, a run's id, or a folder that holds its MLmodel"
CHAMPIONS = "models:/har@"
_NO_CHAMPION = "`har promote` makes the best run the champion; --model also takes a run's id"
CLASSIFIER_PATH = f"artifacts/{CLASSIFIER_FOLDER}"
# It has the names of the classes; 10,000 long ones have a megabyte.
MAX_DESCRIPTION_BYTES = 5_000_000


@dataclass(frozen=True, kw_only=True)
class LoggedModel:
    """A model from the store, and the run that trained it, if the store has it.

    `identity` is the model's own id: an alias in `uri` may mean another model later.
    """

    uri: str
    identity: str
    classifier: Classifier
    run: mlflow.entities.Run | None

    @property
    def split(self) -> Split:
        """The way in which the training run held out its test images."""
        return read_split(self.run) if self.run else Split()


@collect_garbage_later()
def load_logged_model(uri: str) -> LoggedModel:
    """Load the model at `models:/...`, `runs:/ID/model`, ID or in a folder; ID may be a beginning.

    Only its classifier's files are read, by the installed `har`: whoever can write to the store
    could put any code into a model.
    """
    with _open_logged(uri) as (uri, folder, description):
        run = _find_run(description.run_id)
        if run and (source := run.data.tags.get(FROM_TAG)):
            origin = run.data.tags.get(ORIGIN_TAG, "unknown")
            say(f"this model is not of this store: it came with {source}, recorded as run {origin}")
        classifier = load_classifier(folder / CLASSIFIER_PATH)
    return LoggedModel(
        uri=uri, identity=str(description.model_uuid), classifier=classifier, run=run
    )


@contextmanager
def open_classifier(uri: str) -> Iterator[tuple[Path, str]]:
    """Yield the folder of a logged model's classifier, for others to load, and the model's id."""
    with _open_logged(uri) as (_, folder, description):
        yield folder / CLASSIFIER_PATH, str(description.model_uuid)


@contextmanager
def _open_logged(uri: str) -> Iterator[tuple[str, Path, Any]]:
    """Yield the whole URI of a logged model, its folder, and its description."""
    quiet_mlflow()
    uri = complete_model_uri(uri)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(open_model(uri, (MODEL_FILE, CLASSIFIER_PATH)))
            description = _read_description(folder)
        except UNREADABLE as error:
            ways = _NO_CHAMPION if uri.startswith(CHAMPIONS) else _WAYS
            raise UserError(f"no model at {uri}: {first_line(error)}; {ways}") from error
        yield uri, folder, description


def _read_description(folder: Path) -> Any:
    """Read the MLmodel file; of it, only two ids are used."""
    # checked first, because MLflow reads whatever is there
    read_regular_file(folder / MODEL_FILE, MAX_DESCRIPTION_BYTES)
    try:
        return mlflow.models.Model.load(str(folder))
    # YAML's errors, and whatever MLflow raises for values that it does not expect
    except Exception as error:
        raise ValueError(f"{MODEL_FILE} is damaged: {first_line(error)}") from error


def _find_run(run_id: Any) -> mlflow.entities.Run | None:
    # MLflow writes no id where a model was logged outside of a run
    if not isinstance(run_id, str) or not WHOLE_RUN_ID.fullmatch(run_id):
        return None
    try:
        return mlflow.get_run(run_id)
    except MlflowException:
        return None


def check_unseen(logged: LoggedModel, manifest: Manifest) -> None:
    """Raise a UserError if the model was trained on any of the manifest's test images."""
    if logged.run is None:
        return
    run_id = logged.run.info.run_id
    try:
        trained = load_image_table(run_id, ["split", "sha256"])
    except UNREADABLE as error:
        raise UserError(
            f"cannot tell which images {logged.uri} was trained on: run {run_id} has no readable"
            f" table of images: {first_line(error)}"
        ) from error
    seen = set(trained.loc[trained["split"] == "train", "sha256"])
    if known := int(manifest.rows("test")["sha256"].isin(seen).sum()):
        raise UserError(
            f"{known} of the {len(manifest.rows('test'))} test images are among those that"
            f" {logged.uri} was trained on: evaluate it on the split of its run"
            f" ({logged.split.as_options}), or on images it has not seen"
        )


def load_served(uri: str) -> tuple[Any, Classifier]:
    """Load a model as a server does, and the classifier inside.

    This runs code that the model carries: only for a model that this process has just logged.
    """
    try:
        model = mlflow.pyfunc.load_model(uri)
    except MlflowException as error:
        raise UserError(f"{uri} cannot be loaded: {first_line(error)}") from error
    return model, model.unwrap_python_model().classifier


def serve_here(classifier: Classifier) -> Callable[[pd.DataFrame], list[Prediction]]:
    """Build the function that answers as a server would, with the installed code."""
    served = ServedClassifier()
    served.classifier = classifier
    return partial(served.predict, None)
