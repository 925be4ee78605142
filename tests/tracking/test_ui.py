"""The saved view and the description of an experiment."""

import json

import mlflow
import pytest
from mlflow import MlflowClient

from har.tracking.store import open_run
from har.tracking.ui import FIRST_DEFAULTS, VIEW_TAG, digest


def test_what_the_user_set_up_stays(store: str) -> None:
    experiment = mlflow.set_experiment("har-mine").experiment_id
    client = MlflowClient()
    client.set_experiment_tag(experiment, "mlflow.note.content", "mine")
    with open_run("har-mine", {}):
        pass
    assert client.get_experiment(experiment).tags["mlflow.note.content"] == "mine"


def test_an_older_view_is_replaced_and_a_changed_one_stays(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient()

    def record(view: str) -> str:
        experiment = mlflow.set_experiment(f"view {view}").experiment_id
        client.set_experiment_tag(experiment, VIEW_TAG, view)
        for _ in range(2):
            with open_run(f"view {view}", {}):
                pass
        return str(client.get_experiment(experiment).tags[VIEW_TAG])

    monkeypatch.setitem(FIRST_DEFAULTS, VIEW_TAG, digest("as an older version wrote it"))
    assert "feature_cache" in json.loads(record("as an older version wrote it"))["state"]
    assert record("as the user changed it") == "as the user changed it"
