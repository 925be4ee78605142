"""The job `prepare`: check images, hold out the test split, record what was found."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from har.data.layouts import Source
from har.data.manifest import write_manifest
from har.data.prepare import choose_split, load_manifest, prepare
from har.data.report import REPORT_FILE, render_report
from har.data.sources import find_source
from har.data.splits import Split
from har.tracking.descriptions import describe_preparation
from har.tracking.preparation import log_preparation
from har.tracking.store import open_experiment, open_run
from har.tracking.tags import job_tags
from har.tracking.ui import describe_run_page
from har.util.errors import UserError, first_line
from har.util.files import replace_text
from har.util.progress import say


def run_preparation(
    data: str | Source,
    overrides: Mapping[str, Any],
    image_root: Path | None,
    out: Path,
    experiment: str,
    started: float,
) -> None:
    """Prepare `data` into `out`, with its report, and record that as a run.

    With `image_root`, `data` is a prepared folder whose images were moved: it is checked and
    written again.
    """
    open_experiment(experiment)
    if image_root is None:
        source = find_source(data)
        manifest = prepare(source, out, choose_split(overrides, Split(), source))
    else:
        manifest = load_manifest(data, overrides, image_root=image_root)
        write_manifest(manifest, out)
    say("drawing the report")
    report = render_report(manifest)
    try:
        replace_text(out / REPORT_FILE, report)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {first_line(error)}") from error
    # only now: a mistake in the data leaves no run behind
    with open_run(experiment, job_tags("prepare", manifest.name, manifest)) as run:
        log_preparation(run, manifest, report)
        run.describe(describe_preparation(run.id, manifest))
        run.log_metrics({"wall_time_s": time.time() - started})
    say(*describe_run_page(run.id))
