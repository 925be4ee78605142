"""The job `export-runs`: runs of this store in one file, for `har import-runs` elsewhere.

The file is a zip of a small MLflow store, its `mlflow.db` and `mlruns/`, and a digest of each.
"""

import sqlite3
import zipfile
from collections.abc import Sequence
from contextlib import chdir, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from har.tracking import query
from har.tracking.foreign import ARTIFACTS, DATABASE, open_own_store, write_digests
from har.tracking.store import explain_store_errors, quiet_mlflow
from har.tracking.transfer import Target, copy_runs, read_runs
from har.util.errors import UserError, first_line
from har.util.files import replace_file


def export_runs(run_ids: Sequence[str], experiment: str | None, out: Path) -> int:
    """Write runs into the file `out`; return how many.

    Run ids may be their beginnings; a run's nested runs come with it. Without ids, all finished
    runs of the experiment are written.
    """
    quiet_mlflow()
    runs = _find_runs(run_ids, experiment)
    store = open_own_store()
    with TemporaryDirectory() as scratch, explain_store_errors():
        # MLflow creates a folder for artifacts in the working folder
        root = Path(scratch).resolve()
        with chdir(root):
            client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root / DATABASE}")
            target = Target(client, root / ARTIFACTS)
        copy_runs(store, read_runs(store, runs), target)
        with closing(sqlite3.connect(root / DATABASE)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        write_digests(root)
        try:
            _write_zip(root, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    return len(runs)


def _find_runs(run_ids: Sequence[str], experiment: str | None) -> list[Any]:
    if not run_ids:
        name = query.choose_experiment_to_read(experiment)
        finished = "attributes.status = 'FINISHED' and tags.job != ''"
        runs = query.find_runs(finished, [query.find_experiment(name)])
        if not runs:
            raise UserError(f"experiment {name} has no finished runs")
        return runs
    found: dict[str, Any] = {}
    for run_id in map(query.find_run_id, run_ids):
        run = query.load_run(run_id)
        if run.info.status != "FINISHED":
            raise UserError(f"run {run_id} is not finished: its status is {run.info.status}")
        nested = query.find_runs(
            f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}' and attributes.status = 'FINISHED'"
        )
        found |= {each.info.run_id: each for each in (run, *nested)}
    return list(found.values())


def _write_zip(root: Path, out: Path) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        replace_file(out) as opened,
        # files may be dated before 1980
        zipfile.ZipFile(opened, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
    ):
        for path in files:
            archive.write(path, path.relative_to(root))
