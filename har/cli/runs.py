"""Commands about recorded runs: compare, import-notebooks, twins."""

from pathlib import Path

import click

from har.cli.options import (
    experiment_option,
    offline_option,
)
from har.util.progress import quiet_loading


@click.command()
@click.argument("run_ids", nargs=-1)
@click.option("--runs", default="", help="The same, with commas between, as `mlflow run` needs it.")
@click.option(
    "--experiment",
    help="MLflow experiment: all its finished trainings, unless runs are named; the comparison is"
    " recorded there.  [har; under `mlflow run` the one that was given to mlflow]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("comparison"),
    show_default=True,
    help="Gets report.html, which needs nothing else, its tables as CSV and its figures.",
)
@offline_option
def compare(run_ids: tuple[str, ...], runs: str, experiment: str | None, out: Path) -> None:
    """Compare trainings: accuracy, time, recipes, and every pair on the same test images.

    RUN_IDS are finished trainings, published ones too (`har import-notebooks`).
    """
    with quiet_loading():
        from har.jobs.compare import run_comparison
        from har.tracking.store import check_store

    check_store()
    named = [*run_ids, *(each.strip() for each in runs.split(",") if each.strip())]
    click.echo(run_comparison(named, experiment, out))


@click.command()
@experiment_option
def import_notebooks(experiment: str) -> None:
    """Record the five published notebook runs, to stand beside measured ones; once is enough.

    Their times are of other hardware and other images, their accuracy is of training images.
    """
    with quiet_loading():
        from har.jobs.import_notebooks import import_notebooks

    for variant, run_id in import_notebooks(experiment).items():
        click.echo(f"{variant:<10}{run_id}")


@click.command()
@click.argument("run_id")
@offline_option
def twins(run_id: str) -> None:
    """Compare a training with those of the same recipe and data on other hardware.

    Also links them to each other by tags, and removes the links to deleted ones.
    """
    with quiet_loading():
        from har.compare.twins import describe_twins
        from har.tracking.store import check_store

    check_store()
    click.echo(describe_twins(run_id))


COMMANDS = (compare, import_notebooks, twins)
