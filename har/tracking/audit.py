"""Logs an audit of labels into an MLflow run."""

import mlflow

from har.data.report import REPORT_FILE
from har.evaluation.label_report import SUSPECTS_FILE
from har.recipe import AUDIT_FIELDS
from har.tracking.preparation import build_dataset
from har.tracking.store import Run
from har.tracking.tags import recipe_fields, split_params
from har.training.audit import Audit
from har.training.job import TrainingJob


def log_audit(run: Run, job: TrainingJob, found: Audit, files: dict[str, str]) -> None:
    """Log what was asked and found, and the files by their names."""
    asked = recipe_fields(job.used)
    run.log_params(
        {
            "variant": job.variant,
            **{name: asked[name] for name in AUDIT_FIELDS},
            "feature_runtime": job.feature_runtime,
            "folds": found.folds,
            **split_params(job.manifest),
        }
    )
    run.log_dataset(build_dataset(job.manifest), "audit")
    run.log_metrics(
        {
            "suspects": len(found.suspects),
            "images": found.images,
            "out_of_fold_accuracy": found.accuracy,
        }
    )
    for name in (SUSPECTS_FILE, REPORT_FILE):
        mlflow.log_text(files[name], name)
