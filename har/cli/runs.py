"""Commands about recorded runs: compare, export-runs, import-notebooks, import-runs,
twins, ui.
"""

from pathlib import Path

import click

from har.cli.options import (
    experiment_option,
    experiment_to_read_option,
    find_image_folder,
    offline_option,
)
from har.cli.tables import format_comparison, format_imported
from har.util.escaping import for_terminal
from har.util.outputs import COMPARISON, check_output_file, check_output_folder
from har.util.progress import show
from har.util.units import format_bytes


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


@click.command()
@click.argument("run_ids", nargs=-1)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("runs.zip"),
    help="The file to write; it must be new.",
)
@experiment_to_read_option
def export_runs(run_ids: tuple[str, ...], experiment: str | None, out: Path) -> None:
    """Write runs with all that belongs to them into one file, to carry to another machine.

    RUN_IDS are finished runs, whole ids or their beginnings; their nested runs come with them.
    Without RUN_IDS, all finished runs of the experiment are written. `har import-runs` reads the
    file, on any machine and into any store.
    """
    check_output_file(out)
    from har.tracking.query import check_readable_store

    check_readable_store()
    from har.jobs.export_runs import export_runs

    count = export_runs(run_ids, experiment, out)
    show(f"{count:,} runs, {format_bytes(out.stat().st_size)}\n{for_terminal(str(out))}")


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--experiment",
    help="Experiment to import into.  [that of the same name as in the source]",
)
@offline_option
def import_runs(sources: tuple[str, ...], experiment: str | None) -> None:
    """Copy runs of other machines into the present tracking store, and link twins.

    SOURCE is a file of `har export-runs`, a folder or an archive that holds an mlflow.db and its
    mlruns/ (the downloaded output of a Kaggle session, wherever it now lies), or the address of a
    tracking server.

    A run is copied once, whichever way it comes: give the command again to go on after an
    interruption, or to add what a source has gained. The runs' models and pictures are copied as
    files; none of their code runs.
    """
    from har.jobs.import_runs import import_runs

    for each in import_runs(sources, experiment):
        show(format_imported(each))


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True)
@experiment_to_read_option
def ui(port: int, experiment: str | None) -> None:
    """Show the recorded runs in MLflow's UI, at the view that groups them by recipe.

    Starts a server for the store of this folder, and opens the page if there is a desktop. Ctrl-C
    ends it. Where MLFLOW_TRACKING_URI names a server, its page is opened.
    """
    from har.tracking.query import check_readable_store

    check_readable_store()
    from har.jobs.ui import show_runs

    show_runs(port, experiment)


COMMANDS = (compare, export_runs, import_notebooks, import_runs, twins, ui)
