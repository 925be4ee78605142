"""The job `compare`, from finished trainings to its run."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest


@pytest.fixture
def trained(manifest: Any, store: str, tiny_backbone: None) -> list[str]:
    from har.jobs.train import run_training
    from har.training.job import build_job
    from tests.fixtures import tiny_recipe

    recipes = (tiny_recipe("v6"), tiny_recipe("v6", seed=1))
    jobs = [build_job("v3", each, ("backbone",), manifest) for each in recipes]
    return [run_training(each, "compared", started=0.0).run_id for each in jobs]


def test_the_command(trained: list[str], cli, tmp_path: Path) -> None:
    import mlflow

    out = tmp_path / "out"
    cli("import-notebooks", "--experiment", "compared")
    result = cli("compare", "--experiment", "compared", "--out", out)
    assert result.exit_code == 0, result.output
    *table, report = result.stdout.splitlines()
    assert report == f"{out}/report.html"
    # runs with the same test images, then the published ones, which have none
    assert "test images" in table[0] and "published runs, test images unknown" in table
    assert table[1].startswith("run ") and table[1].endswith("run id")
    for run_id in trained:
        (row,) = (line for line in table if line.endswith(run_id[:8]))
        assert row.startswith("v3 ") and "% to " in row
    assert sum("(published)" in line for line in table) == 5
    page = (out / "report.html").read_text()
    assert all(run_id in page for run_id in trained)
    runs = pd.read_csv(out / "runs.csv")
    assert len(runs) >= 7 and set(runs["notebook_minutes"]) == {36, 28, 22, 21}
    (run,) = mlflow.search_runs(
        experiment_names=["compared"],
        filter_string="tags.job = 'compare'",
        output_format="list",
    )
    logged = {each.path for each in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.html", "runs.csv", "figures"} <= logged and run.info.status == "FINISHED"
    named = cli("compare", trained[0][:12], "--runs", trained[1][:12], "--out", tmp_path / "two")
    assert named.exit_code == 0 and len(pd.read_csv(tmp_path / "two/runs.csv")) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0" * 32, "1" * 32], "cannot be read"),
        (["--experiment", "nowhere"], "no such experiment: nowhere"),
        (["--experiment", "Default"], "two finished trainings"),
    ],
)
def test_what_cannot_be_compared(arguments: list[str], said: str, store: str, cli) -> None:
    result = cli("compare", *arguments)
    assert result.exit_code == 2 and said in result.output
    assert not Path("comparison").exists()
