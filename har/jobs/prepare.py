"""The job `prepare`: check images, hold out the test split, record what was found."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow

from har.data.manifest import write_manifest
from har.data.prepare import choose_split, load_manifest, prepare
from har.data.report import REPORT_FILE, render_report
from har.data.sources import find_source
from har.tracking.descriptions import describe_preparation
from har.tracking.log import log_preparation
from har.tracking.store import check_store, open_run, set_description
from har.tracking.tags import preparation_tags
from har.tracking.ui import describe_run_page
from har.util.errors import UserError, first_line
from har.util.files import replace_text
from har.util.progress import say


def run_preparation(
    data: str,
    overrides: Mapping[str, Any],
    image_root: Path | None,
    out: Path,
    experiment: str,
    started: float,
) -> None:
    """Prepare `data` into `out`, with its report, and record that as a run.

    A prepared folder whose images were moved (`image_root`) is checked and written anew.

    Raises:
        UserError: as `check_store`, `prepare` and `load_manifest`.
    """
    check_store(experiment)
    if image_root is None:
        manifest = prepare(find_source(data), out, choose_split(overrides))
    else:
        manifest = load_manifest(data, overrides, image_root=image_root)
        write_manifest(manifest, out)
    say("drawing the report")
    report = render_report(manifest)
    try:
        replace_text(out / REPORT_FILE, report)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {first_line(error)}") from error
    # only now: what was wrong with the data leaves no run behind
    with open_run(experiment, preparation_tags(manifest)) as run_id:
        log_preparation(manifest, report)
        set_description(describe_preparation(run_id, manifest))
        mlflow.log_metric("wall_time_s", time.time() - started)
    say(f"see it: {describe_run_page(run_id)}")
