"""A whole ablation, interrupted and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest

from har.jobs import ablate
from tests.compare.test_ablation import ARGUMENTS
from tests.jobs.conftest import in_a_thread


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "in_own_process", in_a_thread)


def test_the_command_and_again(
    in_this_process: None, tiny_backbone: None, tiny_raw: Path, store: str, cli
) -> None:
    one_device = ("--strategy", "one_device", "--precision", "float32")
    ends = (*one_device, "--from", "v4", "--to", "v5", "--experiment", "ablated")
    result = cli(*ARGUMENTS, *ends, "--data", tiny_raw)
    assert result.exit_code == 0, result.output
    for change in ("loader=features", "augmentation=none"):
        assert result.output.count(f"{change}, added") == 3
    ids = [mlflow.get_experiment_by_name("ablated").experiment_id]
    (parent,) = mlflow.search_runs(ids, "tags.job = 'ablate'", output_format="list")
    children = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    assert len(children) == 4
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        # with another augmentation the test images' features are the same
        warm = child.data.tags["feature_cache"] == "hit"
        assert (child.data.metrics.get("saved_time_s", 0.0) > 0) is warm
    assert mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/ablation.txt") in result.output
    # all there: nothing is trained again
    again = cli(*ARGUMENTS, *ends, "--data", tiny_raw)
    assert again.exit_code == 0, again.output
    together = ("--group", "loader,augmentation", "--chain-only")
    short = cli(*ARGUMENTS, *ends, *together, "--data", tiny_raw)
    assert short.exit_code == 0, short.output
    assert short.output.count("augmentation=none, loader=features, added") == 0
    assert short.output.count("loader=features, augmentation=none, added to the changes") == 1
    assert len(mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")) == 4


@pytest.fixture
def second_training_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process takes as long as ten tests: the others stay in this one."""
    in_own_process, trainings = ablate.in_own_process, []

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        if function is ablate.train_child:
            trainings.append(arguments)
            if len(trainings) == 2:
                return in_own_process(function, *arguments)
        return in_a_thread(function, *arguments)

    monkeypatch.setattr(ablate, "in_own_process", run)


@pytest.mark.slow
def test_features_are_shared_and_their_time_counts_all_the_same(
    second_training_in_its_own_process: None, tiny_raw: Path, store: str, cli
) -> None:
    """One change between two recipes that train on the same features."""
    change = ("--from", "original", "--to", "v1", "--experiment", "shared")
    same = ("--loader", "features", "--strategy", "one_device", "--runtime", "tensorflow")
    result = cli(*ARGUMENTS, *change, *same, "--data", tiny_raw)
    assert result.exit_code == 0, result.output
    ids = [mlflow.get_experiment_by_name("shared").experiment_id]
    (parent,) = mlflow.search_runs(ids, "tags.job = 'ablate'", output_format="list")
    children = mlflow.search_runs(ids, "tags.job = 'train'", output_format="list")
    # what the first has computed, the second finds; its time counts for both
    warm, cold = children
    assert [each.data.tags["feature_cache"] for each in (cold, warm)] == ["miss", "hit"]
    before, after = cold.data.metrics, warm.data.metrics
    assert before["saved_time_s"] == 0 < after["saved_time_s"] < before["extraction_time_s"]
    table = pd.read_csv(
        mlflow.artifacts.download_artifacts(f"runs:/{parent.info.run_id}/ablation.csv")
    )
    assert sorted(table["kind"]) == ["add", "chain", "leave"]
    after_s = after["wall_time_s"] + after["saved_time_s"]
    expected = [[before["wall_time_s"], after_s]] * 3
    np.testing.assert_allclose(table[["wall_s_before", "wall_s_after"]], expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "v3", "--to", "v3"], "the same"),
        (["--from", "v2", "--to", "v3"], "the same"),
        (["--from", "v9"], "v9"),
        (["--num-seeds", "0"], "0"),
        (["--epochs", "-1"], "-1"),
        (["--group", "head,nothing"], "names nothing, which does not change"),
    ],
)
def test_what_cannot_be_ablated(
    arguments: list[str], said: str, tiny_raw: Path, store: str, cli
) -> None:
    before = len(mlflow.search_runs(search_all_experiments=True, output_format="list"))
    result = cli("ablate", "--data", tiny_raw, *arguments)
    assert result.exit_code == 2 and said in result.output
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == before
