"""Runs read back, those that an older version recorded among them."""

import mlflow
import pytest
from mlflow import MlflowClient

from har.tracking.records import read_record
from har.tracking.tags import read_tags


def record(**tags: str) -> mlflow.entities.Run:
    """A run as a training leaves it, without the training."""
    client = MlflowClient()
    common = {"job": "train", "variant": "v5", "hardware": "1xT4", "source": "measured"}
    run_id = client.create_run("0", tags={**common, **tags}).info.run_id
    client.log_metric(run_id, "accuracy", 0.5)
    client.log_metric(run_id, "images_per_second", 10.0)
    return client.get_run(run_id)


@pytest.mark.parametrize(
    ("old", "new"), [("warm", "hit"), ("cold", "miss"), ("none", "none")], ids=str
)
def test_older_tags_read_as_todays(old: str, new: str, store: str) -> None:
    older = record(changed="epochs=3", features=old)
    newer = record(differs_from_variant="epochs=3", feature_cache=new)
    assert {**read_tags(older), "mlflow.runName": ""} == {**read_tags(newer), "mlflow.runName": ""}
    one, other = read_record(older), read_record(newer)
    assert one.differs_from_variant == other.differs_from_variant == "epochs=3"
    assert one.cache_hit == other.cache_hit == (new == "hit")
    assert one.images_per_second == other.images_per_second == (10.0 if new == "none" else None)
    # a metric that was added since is not known of it
    assert one.test_metrics == {"accuracy": 0.5} and one.accuracy == 0.5
