"""What is recorded, read back: a logged model, and a run that is to be repeated."""

import tempfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException

from har.classifier import CLASSIFIER_FOLDER, Classifier, load_classifier
from har.errors import UserError, first_line
from har.manifest import TABLE_FILE, Manifest
from har.recipe import Recipe
from har.splits import Split
from har.store import quiet_mlflow
from har.tracking import RECIPE_ARTIFACT


@dataclass(frozen=True, kw_only=True)
class Logged:
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
        return split_of(self.run) if self.run else Split()


def split_of(run: mlflow.entities.Run) -> Split:
    """How a training run held its test images out."""
    params = run.data.params
    # parameters are text
    kinds = {name: type(value) for name, value in vars(Split()).items()}
    return Split(**{name: kind(params[name]) for name, kind in kinds.items()})


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is needed to repeat a recorded training."""

    run_id: str
    variant: str
    recipe: Recipe
    split: Split
    digests: dict[str, str]
    runtime: str
    feature_runtime: str | None


def load_past(run_id: str) -> Past:
    """Read a training run's recipe as used, its split, and the digests of its data.

    Raises:
        UserError: no such run, or not a training run of this project.
    """
    quiet_mlflow()
    try:
        run = mlflow.get_run(run_id)
        recipe = mlflow.artifacts.load_dict(f"runs:/{run_id}/{RECIPE_ARTIFACT}")
        return Past(
            run_id=run_id,
            variant=recipe["variant"],
            recipe=Recipe(**recipe["used"]),
            split=split_of(run),
            runtime=run.data.params["runtime"],
            feature_runtime=run.data.params.get("used.feature_runtime"),
            digests={name: run.data.tags[name] for name in ("dataset_digest", "test_digest")},
        )
    except (MlflowException, OSError, KeyError, TypeError) as error:
        raise UserError(f"run {run_id} cannot be repeated: {first_line(error)}") from error


def check_same_data(past: Past, manifest: Manifest) -> None:
    """Raise a UserError that says what differs unless the data are those of the past run."""
    for name, before in past.digests.items():
        if (now := getattr(manifest, name)) != before:
            raise UserError(
                f"these are not the images of run {past.run_id}: its {name} is {before}, this"
                f" data's is {now}"
            )


def load_logged(uri: str) -> Logged:
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
    return Logged(
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


def check_unseen(logged: Logged, manifest: Manifest) -> None:
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
