"""The job `compare`: trainings side by side in one report, recorded as a run."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlflow

from har.compare.pictures import find_recorded_images
from har.compare.report import build_comparison, write_comparison
from har.data.report import REPORT_FILE
from har.tracking import query
from har.tracking.descriptions import describe_comparison
from har.tracking.records import Record, load_records
from har.tracking.store import DEFAULT_EXPERIMENT, open_run
from har.tracking.tags import job_tags
from har.tracking.ui import describe_run_page
from har.util.errors import UserError, first_line
from har.util.files import replace_tree
from har.util.progress import say


def run_comparison(
    run_ids: Sequence[str], experiment: str | None, out: Path, images: Path | None = None
) -> tuple[list[Record], Path]:
    """Compare trainings, write the report into `out`, and record it as a run; return the trainings
    and the report's file.

    Run ids may be their beginnings. Without any, all finished trainings of the experiment are
    compared. `images` is the folder that the runs' images lie in, if not where they were.
    """
    if run_ids:
        name = experiment or query.find_current_experiment() or DEFAULT_EXPERIMENT
        found = dict.fromkeys(map(query.find_run_id, run_ids))
        runs: list[Any] = [query.find_training(run_id) for run_id in found]
    else:
        name = query.choose_experiment_to_read(experiment)
        finished = "tags.job = 'train' and attributes.status = 'FINISHED'"
        runs = query.find_runs(finished, [query.find_experiment(name)])
    records = load_records(runs)
    if len(records) < 2:
        where = "among those named" if run_ids else f"in experiment {name}"
        raise UserError(f"a comparison needs two finished trainings; {where}: {len(records)}")
    say("drawing the comparison")
    looks = _count_looks(name)
    comparison = build_comparison(records, partial(find_recorded_images, named=images), looks)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "comparison"
        write_comparison(comparison, folder)
        with open_run(name, job_tags("compare", f"{len(records)} runs")) as run:
            mlflow.log_artifacts(str(folder))
            run.describe(describe_comparison(run.id, len(records)))
        try:
            replace_tree(folder, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    say(*describe_run_page(run.id))
    return records, out / REPORT_FILE


def _count_looks(experiment: str) -> Counter[str]:
    """Count the finished evaluations of an experiment by the digest of their test images."""
    try:
        ids = [query.find_experiment(experiment)]
    except UserError:
        # the comparison's own experiment may be new
        return Counter()
    runs = query.find_runs("attributes.status = 'FINISHED' and metrics.accuracy >= 0", ids)
    return Counter(run.data.tags.get("test_digest", "") for run in runs)
