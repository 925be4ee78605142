"""Logs prepared data into an MLflow run. It loads no TensorFlow: `har prepare` needs none."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import mlflow.data.pandas_dataset

from har.data.duplicates import describe_groups
from har.data.manifest import Manifest, format_manifest_files
from har.data.report import REPORT_FILE, draw_class_balance, draw_samples
from har.data.splits import Split
from har.tracking.store import Run
from har.tracking.tags import count_images, split_params
from har.util.files import shorten_home


def log_preparation(run: Run, manifest: Manifest, report: str) -> None:
    """Log the data set, its split, counts, tables, pictures and the page `report`."""
    # as metrics, counts would stand among the accuracies in the UI's charts
    run.log_params({**split_params(manifest), **count_images(manifest)})
    run.log_dataset(build_dataset(manifest), "preparation")
    log_manifest(manifest)
    run.log_table(lambda: describe_groups(manifest.table), "duplicates.csv")
    mlflow.log_text(report, REPORT_FILE)
    run.log_figure(lambda: draw_class_balance(manifest), "figures/class_balance.png")
    run.log_figure(lambda: draw_samples(manifest), "figures/samples.png")


def log_manifest(manifest: Manifest) -> None:
    """Log both files of a prepared folder, without the user's home folder: others may read them."""
    split = Split(**split_params(manifest))
    shared = replace(manifest, summary=replace(manifest.summary, split=split))
    root = shorten_home(str(manifest.root))
    with TemporaryDirectory() as scratch:
        for name, data in format_manifest_files(shared, root).items():
            (Path(scratch) / name).write_bytes(data)
            mlflow.log_artifact(str(Path(scratch) / name))


def build_dataset(manifest: Manifest) -> mlflow.data.pandas_dataset.PandasDataset:
    """Build what MLflow records of a data set."""
    # without a digest, MLflow would compute another one from the table
    return mlflow.data.pandas_dataset.from_pandas(
        manifest.table,
        source=shorten_home(str(manifest.root)),
        targets="label",
        name=manifest.name,
        digest=manifest.dataset_digest,
    )
