"""The other jobs that are recorded: preparing images, judging a logged model, comparing runs."""

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from har import descriptions, store, tracking
from har import manifest as manifests
from har.archive import load_records
from har.comparison_report import compare, write_comparison
from har.data_report import REPORT_FILE, render_report
from har.errors import UserError, first_line
from har.evaluation import Evaluation, evaluate
from har.files import replace_text
from har.manifest import Manifest
from har.packaging import load_served, measure_latency
from har.prepare import choose_split, load_manifest, prepare
from har.progress import say
from har.recorded import Logged, check_unseen
from har.robustness import MOST_IMAGES, measure_robustness
from har.sources import find_source
from har.trials import EXPERIMENT, where_to_see


def run_preparation(
    data: str,
    typed: Mapping[str, Any],
    images: Path | None,
    out: Path,
    experiment: str,
    started: float,
) -> None:
    """Prepare `data` into `out`, with its report, and record that as a run.

    A prepared folder whose images were moved (`images`) is checked and written anew.

    Raises:
        UserError: as `check_store`, `prepare` and `load_manifest`.
    """
    store.check_store(experiment)
    if images is None:
        manifest = prepare(find_source(data), out, choose_split(typed))
    else:
        manifest = load_manifest(data, typed, images=images)
        manifests.write(manifest, out)
    say("drawing the report")
    report = render_report(manifest)
    try:
        replace_text(out / REPORT_FILE, report)
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {first_line(error)}") from error
    # only now: what was wrong with the data leaves no run behind
    with store.open_run(experiment, tracking.preparation_tags(manifest)) as run_id:
        tracking.log_preparation(manifest, report)
        store.set_description(descriptions.describe_preparation(run_id, manifest))
        mlflow.log_metric("wall_time_s", time.time() - started)
    say(f"see it: {where_to_see(run_id)}")


def run_comparison(run_ids: Sequence[str], experiment: str | None, out: Path) -> Path:
    """Compare trainings, write the report with its tables and figures into `out`, and record that
    as a run; the report's file.

    Without ids, all finished trainings of the experiment; under `mlflow run` its own by default.

    Raises:
        UserError: a run that is no finished training, fewer than two, or `out` cannot be written.
    """
    store.quiet_mlflow()
    name = experiment or store.own_experiment() or EXPERIMENT
    records = load_records(find_trainings(run_ids, name))
    if len(records) < 2:
        where = "among those named" if run_ids else f"in experiment {name}"
        raise UserError(f"a comparison needs two finished trainings; {where}: {len(records)}")
    say("drawing the comparison")
    comparison = compare(records)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "comparison"
        write_comparison(comparison, folder)
        with store.open_run(name, tracking.comparison_tags(len(records))) as run_id:
            mlflow.log_artifacts(str(folder))
            store.set_description(descriptions.describe_comparison(run_id, len(records)))
        try:
            shutil.copytree(folder, out, dirs_exist_ok=True)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    say(f"see it: {where_to_see(run_id)}")
    return out / REPORT_FILE


def find_trainings(run_ids: Sequence[str], experiment: str) -> list[Any]:
    """The runs named, or all finished trainings of the experiment."""
    if not run_ids:
        experiment_ids = [store.find_experiment(experiment)]
        runs = store.find_runs(
            "tags.job = 'train' and attributes.status = 'FINISHED'", experiment_ids
        )
    else:
        runs = [store.find_training(run_id) for run_id in dict.fromkeys(run_ids)]
    return runs


def evaluate_logged(
    logged: Logged, manifest: Manifest, experiment: str, robustness_images: int = MOST_IMAGES
) -> tuple[Evaluation, pd.DataFrame | None]:
    """Judge a logged model on the manifest's test split, in a run of its own.

    Also returns the table of `robustness.measure` on at most `robustness_images`, 0 for none.

    Raises:
        UserError: the model was trained on some of these images; or as `evaluation.evaluate`.
    """
    check_unseen(logged, manifest)
    # what is recorded says on which images it was judged
    manifests.check_bytes(manifest, manifest.rows("test"))
    evaluation = evaluate(logged.classifier, manifest)
    robustness = None
    if robustness_images:
        robustness = measure_robustness(logged.classifier, manifest, robustness_images)
    latency = measure_latency(load_served(logged.uri)[0], manifest)
    tags = tracking.evaluation_tags(logged.uri, logged.run, manifest)
    with store.open_run(experiment, tags) as run_id:
        tracking.log_evaluation(evaluation, latency, manifest, model_id=None)
        if robustness is not None:
            store.log_table_file(robustness, "evaluation/robustness.csv")
        store.set_description(descriptions.describe_evaluation(run_id, logged.uri, evaluation))
    say(f"see it: {where_to_see(run_id)}")
    return evaluation, robustness
