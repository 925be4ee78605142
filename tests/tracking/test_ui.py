"""The saved view and the description of an experiment."""

import mlflow
from mlflow import MlflowClient

from har.tracking.store import open_run


def test_what_the_user_set_up_stays(store: str) -> None:
    experiment = mlflow.set_experiment("har-mine").experiment_id
    client = MlflowClient()
    client.set_experiment_tag(experiment, "mlflow.note.content", "mine")
    with open_run("har-mine", {}):
        pass
    assert client.get_experiment(experiment).tags["mlflow.note.content"] == "mine"
