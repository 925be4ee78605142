"""Runs found by the beginning of their ids; reading that creates nothing; what is left out."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from har.tracking.query import (
    check_readable_store,
    choose_experiment_to_read,
    complete_model_uri,
    find_run_id,
    pick_by_prefix,
)
from har.util.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """Where a store of this test alone will be."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path / "mlflow.db"
    mlflow.set_tracking_uri(before)


@pytest.fixture
def client(file: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient()


def finish_training(client: mlflow.MlflowClient, experiment_id: str, **tags: str) -> str:
    run = client.create_run(experiment_id, tags={"job": "train", **tags}, run_name="v5")
    client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def test_a_run_is_found_by_the_beginning_of_its_id(client: mlflow.MlflowClient) -> None:
    run_ids = [finish_training(client, "0") for _ in range(17)]
    assert {find_run_id(each[:20]) for each in run_ids} == set(run_ids)
    # whole ids need no store, so that what reads the run says what is wrong with it
    assert find_run_id("0" * 32) == "0" * 32
    assert complete_model_uri(f"runs:/{run_ids[0][:20]}/model") == f"runs:/{run_ids[0]}/model"
    assert complete_model_uri("some/folder") == "some/folder"
    # 17 ids, 16 digits
    first = [each[0] for each in run_ids]
    twice = next(each for each in first if first.count(each) > 1)
    with pytest.raises(UserError, match=f"run ids begin with {twice}: {twice}.* \\(v5\\), {twice}"):
        find_run_id(twice)
    client.delete_run(run_ids[0])
    with pytest.raises(UserError, match=r"no run id in sqlite:.* begins with"):
        find_run_id(run_ids[0][:20])


@pytest.mark.parametrize("wrong", ["", "xyz", "%", "ab'", "v5 lite0"])
def test_what_is_no_beginning_of_a_run_id(wrong: str) -> None:
    with pytest.raises(UserError, match="is no run id"):
        find_run_id(wrong)


def test_many_candidates_are_counted() -> None:
    names = {f"a{i}": f" (run {i})" for i in range(9)}
    with pytest.raises(UserError) as caught:
        pick_by_prefix("a", names)
    assert str(caught.value).endswith("a3 (run 3), a4 (run 4) and 4 more")
    assert pick_by_prefix("a3", names) == "a3" and pick_by_prefix("b", names) is None


def test_a_store_that_is_not_there_is_not_created(file: Path) -> None:
    for uri in ("runs:/abc/model", "models:/har@champion"):
        with pytest.raises(UserError, match=f"there is no {file}; cd to the folder"):
            complete_model_uri(uri)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        check_readable_store()
    assert not file.exists()


def test_trainings_of_other_experiments_are_left_out_aloud(
    client: mlflow.MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_experiment_to_read(None) == "har" and capsys.readouterr().err == ""
    client.create_experiment("har")
    finish_training(client, client.create_experiment("my own"), recipe_digest="1")
    for _ in range(2):
        finish_training(client, "0", recipe_digest="1")
    # published, not trained here
    finish_training(client, "0", source="notebook")
    assert choose_experiment_to_read(None) == "har"
    said = capsys.readouterr().err
    assert "in other experiments (2 in Default, 1 in my own); --experiment Default uses" in said
    assert choose_experiment_to_read("my own") == "my own" and capsys.readouterr().err == ""
