"""The job `audit-labels`: images whose label is in doubt, as a table and a page, and a run."""

import tempfile
import time
from pathlib import Path

from har.data.report import REPORT_FILE
from har.evaluation.label_report import SUSPECTS_FILE, render_label_report
from har.tracking.audit import log_audit
from har.tracking.descriptions import describe_audit
from har.tracking.store import open_run
from har.tracking.tags import job_tags
from har.tracking.ui import describe_run_page
from har.training.audit import Audit, audit
from har.training.job import TrainingJob
from har.util.errors import UserError, first_line
from har.util.escaping import format_csv
from har.util.files import replace_tree
from har.util.progress import say


def run_audit(
    job: TrainingJob, out: Path, experiment: str, started: float, commands: tuple[str, str]
) -> Audit:
    """Find labels in doubt, write both files into `out`, and record that as a run.

    `commands` are named on the page: the one that made it, and one that trains without suspects.
    """
    manifest = job.manifest
    found = audit(job)
    say("drawing the page")
    files = {
        REPORT_FILE: render_label_report(found, manifest, *commands),
        SUSPECTS_FILE: format_csv(found.suspects),
    }
    _write(files, out)
    # only now: a mistake in the data leaves no run behind
    with open_run(experiment, job_tags("audit-labels", manifest.name, manifest)) as run:
        log_audit(run, job, found, files)
        run.describe(describe_audit(run.id, manifest, len(found.suspects), found.images))
        run.log_metrics({"wall_time_s": time.time() - started})
    say(*describe_run_page(run.id))
    return found


def _write(files: dict[str, str], out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in files.items():
            (Path(scratch) / name).write_text(text, encoding="utf-8")
        try:
            # the page, which marks the folder as ours, comes first
            replace_tree(Path(scratch), out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {first_line(error)}") from error
