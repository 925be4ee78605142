"""The job `evaluate`: evaluate a logged model on the test split, and record that as a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from har.data.layouts import Source
from har.data.manifest import Manifest, check_bytes
from har.data.prepare import check_split, load_manifest
from har.evaluation.evaluate import Evaluation, evaluate
from har.evaluation.latency import measure_latency
from har.evaluation.robustness import MAX_IMAGES, measure_robustness
from har.serving.load import LoggedModel, check_unseen, serve_here
from har.tracking.descriptions import describe_evaluation
from har.tracking.log import log_evaluation
from har.tracking.records import load_recorded_manifest
from har.tracking.store import open_run
from har.tracking.tags import evaluation_tags
from har.tracking.ui import describe_run_page
from har.util.progress import say


def load_test_data(
    logged: LoggedModel,
    data: str | Source,
    overrides: Mapping[str, Any],
    image_root: Path | None,
) -> Manifest:
    """Return the data that the user named, split as for the model's training; else, with `auto`,
    that of the training itself.
    """
    if data != "auto" or logged.run is None:
        manifest = load_manifest(data, overrides, logged.split, image_root)
        trained_on = logged.run.data.tags.get("test_digest") if logged.run else None
        if trained_on and trained_on != manifest.test_digest:
            say(
                f"these are other test images than those of the training: {manifest.test_digest},"
                f" not {trained_on}"
            )
        return manifest
    manifest = load_recorded_manifest(logged.run.info.run_id, image_root)
    check_split(manifest, overrides)
    say(f"data: that of the training, {manifest.name} in {manifest.root}")
    return manifest


def evaluate_logged_model(
    logged: LoggedModel, manifest: Manifest, experiment: str, robustness_images: int = MAX_IMAGES
) -> tuple[Evaluation, pd.DataFrame | None]:
    """Evaluate a logged model on the manifest's test split, and record that as a new run.

    Return the evaluation, and the table of `measure_robustness` on at most `robustness_images`, or
    None if that is 0.

    Raises:
        UserError: the model was trained on some of these images, or there are none.
    """
    check_unseen(logged, manifest)
    # the run will name these images, so they must still be those
    check_bytes(manifest, manifest.rows("test"))
    evaluation = evaluate(logged.classifier, manifest)
    robustness = None
    if robustness_images:
        robustness = measure_robustness(logged.classifier, manifest, robustness_images)
    latency = measure_latency(serve_here(logged.classifier), manifest)
    tags = evaluation_tags(logged.uri, logged.run, manifest)
    with open_run(experiment, tags) as run:
        log_evaluation(run, evaluation, latency, manifest, model_id=None)
        if robustness is not None:
            run.log_table(lambda: robustness, "evaluation/robustness.csv")
        run.describe(describe_evaluation(run.id, logged.uri, evaluation))
    say(*describe_run_page(run.id))
    return evaluation, robustness
