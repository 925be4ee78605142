"""`notebooks/kaggle.ipynb`: short cells without output, and a run of it from end to end."""

import json
import sys
from pathlib import Path

import mlflow
import pytest

from tests.fixtures import tracking_to

PROJECT = Path(__file__).parents[2]
NOTEBOOK = PROJECT / "notebooks" / "kaggle.ipynb"
MOST_LINES = 12


def test_cells_are_short_and_hold_no_output() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [each for each in notebook["cells"] if each["cell_type"] == "code"]
    assert len(cells) >= 6
    for each in cells:
        assert each["outputs"] == [] and each["execution_count"] is None
        assert len(each["source"]) <= MOST_LINES
        compile("".join(each["source"]), str(NOTEBOOK), "exec")


@pytest.mark.slow
def test_it_trains_and_its_run_goes_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli
) -> None:
    import nbformat
    from nbclient import NotebookClient

    session, home = tmp_path / "session", tmp_path / "home"
    session.mkdir()
    home.mkdir()
    monkeypatch.setenv("HAR_PROJECT", str(PROJECT))
    monkeypatch.setenv("HAR_NOTEBOOK_VARIANT", "v5")
    monkeypatch.setenv("HAR_NOTEBOOK_OPTIONS", "data=sample epochs=2 image_size=64")
    # the cells run in this environment, where the project is installed
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(session)}}
    NotebookClient(notebook, timeout=500, resources=resources).execute()
    shown = json.dumps([each.get("outputs", []) for each in notebook.cells])
    assert "1xCPU" in shown and "wall_time_s" in shown and "runs.zip" in shown
    monkeypatch.chdir(home)
    uri = f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with tracking_to(uri):
        result = cli("import-runs", session / "runs.zip")
        assert result.exit_code == 0 and "1 runs added" in result.stdout, result.output
        assert "0 runs added" in cli("import-runs", session).stdout
        (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.tags["variant"] == "v5" and run.data.metrics["accuracy"] > 0
