"""Commands about recorded runs: compare, import-notebooks, twins."""

from pathlib import Path

import click

from har.cli.options import (
    experiment_option,
    experiment_to_read_option,
    find_image_folder,
    offline_option,
)
from har.cli.tables import format_comparison
from har.util.escaping import for_terminal
from har.util.outputs import COMPARISON, check_output_folder
from har.util.progress import show


@click.command()
@click.argument("run_ids", nargs=-1)
@click.option("--runs", help="The same as RUN_IDS, separated by commas; for `mlflow run`.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("comparison"),
    help="Folder for report.html, which needs no other file, and its tables and figures.",
)
@click.option(
    "--data",
    metavar="DIR",
    help="The images of the runs, if they were moved, or the runs are another machine's. The report"
    " shows those on which two runs disagree.  [where the runs found them, if unchanged]",
)
@experiment_to_read_option
def compare(
    run_ids: tuple[str, ...], runs: str | None, experiment: str | None, out: Path, data: str | None
) -> None:
    """Compare trainings: accuracy, time, recipes, and every pair on the same test images.

    RUN_IDS are finished trainings, whole ids or their beginnings. Without them, all finished
    trainings of the experiment are compared, published ones (`har import-notebooks`) included.
    The comparison is recorded in the experiment.
    """
    check_output_folder(out, COMPARISON)
    images = find_image_folder(data) if data else None
    from har.tracking.query import check_readable_store

    check_readable_store()
    from har.jobs.compare import run_comparison

    more = [each.strip() for each in (runs or "").split(",") if each.strip()]
    records, report = run_comparison([*run_ids, *more], experiment, out, images)
    show(f"{format_comparison(records)}\n{for_terminal(str(report))}")


@click.command()
@experiment_option
def import_notebooks(experiment: str) -> None:
    """Record the five published notebook runs, to compare yours with; once is enough.

    Their times are of other hardware and other images. Their accuracy is training accuracy.
    """
    from har.jobs.import_notebooks import import_notebooks

    for variant, run_id in import_notebooks(experiment).items():
        show(f"{variant:<10}{run_id}")


@click.command()
@click.argument("run_id")
@offline_option
def twins(run_id: str) -> None:
    """Compare a training with those of the same recipe and data on other hardware.

    Also links them to each other by tags, and removes the links to deleted runs.
    """
    from har.tracking.query import check_readable_store, find_run_id

    check_readable_store()
    from har.compare.twins import describe_twins

    show(describe_twins(find_run_id(run_id)))


COMMANDS = (compare, import_notebooks, twins)
