"""Commands about recorded runs: compare, import-notebooks, twins."""

from pathlib import Path

import click

from har.cli.options import experiment_option, experiment_to_read_option, offline_option
from har.cli.tables import format_table, format_training


@click.command()
@click.argument("run_ids", nargs=-1)
@click.option(
    "--runs", default="", help="The same as RUN_IDS, separated by commas; for `mlflow run`."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("comparison"),
    show_default=True,
    help="Folder for report.html, which needs no other file, and its tables and figures.",
)
@experiment_to_read_option
def compare(run_ids: tuple[str, ...], runs: str, experiment: str | None, out: Path) -> None:
    """Compare trainings: accuracy, time, recipes, and every pair on the same test images.

    RUN_IDS are finished trainings, whole ids or their beginnings. Without them, all finished
    trainings of the experiment are compared, published ones (`har import-notebooks`) included.
    The comparison is recorded in the experiment.
    """
    from har.tracking.query import check_readable_store

    check_readable_store()
    from har.jobs.compare import run_comparison

    named = [*run_ids, *(each.strip() for each in runs.split(",") if each.strip())]
    trainings, report = run_comparison(named, experiment, out)
    rows = [
        format_training(
            each.variant,
            f"{each.hardware}{' (published)' if each.published else ''}",
            each.test_metrics,
            each.seconds,
            each.cache_hit,
            each.run_id[:8],
        )
        for each in trainings
    ]
    click.echo(f"{format_table(rows)}\n{report}")


@click.command()
@experiment_option
def import_notebooks(experiment: str) -> None:
    """Record the five published notebook runs, to compare yours with; once is enough.

    Their times are of other hardware and other images. Their accuracy is training accuracy.
    """
    from har.jobs.import_notebooks import import_notebooks
    from har.tracking.store import check_store

    check_store(experiment)
    for variant, run_id in import_notebooks(experiment).items():
        click.echo(f"{variant:<10}{run_id}")


@click.command()
@click.argument("run_id")
@offline_option
def twins(run_id: str) -> None:
    """Compare a training with those of the same recipe and data on other hardware.

    Each of them gets a tag and a line in its description that link the others.
    """
    from har.tracking.query import check_readable_store, find_run_id

    check_readable_store()
    from har.compare.twins import describe_twins, link_twins

    click.echo(describe_twins(*link_twins(find_run_id(run_id))))


COMMANDS = (compare, import_notebooks, twins)
