"""Commands about images and what is kept of them: variants, sample, prepare, cache."""

from pathlib import Path
from typing import Any

import click

from har.cli.options import (
    data_options,
    experiment_option,
    typed_split,
)
from har.util.process import process_start
from har.util.progress import quiet_loading


@click.command()
def variants() -> None:
    """Print the variants: each notebook, and what it changes from the one before."""
    from har.notebooks import describe_variants

    click.echo(describe_variants())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--per-class",
    type=click.IntRange(2),
    default=24,
    show_default=True,
    help="Labelled images of each action.",
)
@click.option(
    "--test-images",
    type=click.IntRange(0),
    default=30,
    show_default=True,
    help="Unlabelled images, as in Kaggle's test/.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def sample(out: Path, per_class: int, test_images: int, seed: int) -> None:
    """Draw the built-in sample of 15 actions, in Kaggle's layout."""
    from har.data.sources import draw_sample

    click.echo(draw_sample(out, per_class, test_images, seed))


@click.command()
@data_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("prepared"),
    show_default=True,
    help="Gets manifest.csv, dataset.json and report.html; images stay where they are.",
)
@experiment_option
def prepare(data: str, image_root: Path | None, out: Path, experiment: str, **options: Any) -> None:
    """Check every image, group copies, hold out the test split, and record what was found.

    A prepared folder with --image-root is written anew for images that were moved.
    """
    with quiet_loading():
        from har.jobs.prepare import run_preparation

    run_preparation(data, typed_split(options), image_root, out, experiment, process_start())
    click.echo(out)


@click.command()
@click.option("--clear", is_flag=True, help="Delete every entry that no process is at work on.")
def cache(clear: bool) -> None:
    """List the features kept on disk, the last used first; or delete them.

    They lie in $HAR_CACHE/features (~/.cache/har) and take at most $HAR_CACHE_GB gigabytes (20);
    what was not used for longest goes first. Backups of trainings that were cut short are listed
    too; --clear leaves them.
    """
    from har.training import feature_cache
    from har.training.backup import describe_backups

    if clear:
        click.echo(f"freed {feature_cache.clear_cache() / 1e6:,.1f} MB")
    click.echo("\n".join([feature_cache.describe_cache(), *describe_backups()]))


COMMANDS = (variants, sample, prepare, cache)
