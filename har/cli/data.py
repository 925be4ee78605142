"""Commands about images and cached features: variants, sample, prepare, audit-labels, cache."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from har.cli.options import (
    Spelled,
    combine,
    data_options,
    experiment_option,
    find_named_data,
    pop_split,
    recipe_option,
    runtime_option,
)
from har.recipe import AUDIT_FIELDS, VARIANTS, Recipe, build_recipe
from har.util.escaping import for_terminal
from har.util.outputs import AUDIT, PREPARED, check_output_folder
from har.util.process import process_start, spell_command
from har.util.progress import show
from har.util.units import format_bytes


@click.command()
def variants() -> None:
    """Print the variants: what each one changes from the one before, and which to use."""
    from har.notebooks import describe_variants

    show(describe_variants())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option(
    "--per-class", type=click.IntRange(2), default=24, help="Labelled images for each action."
)
@click.option(
    "--test-images",
    type=click.IntRange(0),
    default=30,
    help="Unlabelled images, as in Kaggle's test/.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Decides what is drawn.")
def sample(out: Path, per_class: int, test_images: int, seed: int) -> None:
    """Draw the built-in sample of 15 actions, in Kaggle's layout."""
    from har.data.sources import draw_sample

    show(for_terminal(str(draw_sample(out, per_class, test_images, seed))))


@click.command()
@data_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("prepared"),
    help="Folder for the table, manifest.csv or .parquet, dataset.json and report.html; images stay"
    " where they are.",
)
@experiment_option
def prepare(data: str, image_root: Path | None, out: Path, experiment: str, **options: Any) -> None:
    """Check every image, group copies, hold out the test split, and record the result.

    If you moved the images of a prepared folder, give it as --data and their new place as
    --image-root.
    """
    check_output_folder(out, PREPARED)
    found = find_named_data(data)
    from har.jobs.prepare import run_preparation

    run_preparation(found, pop_split(options), image_root, out, experiment, process_start())
    show(for_terminal(str(out)))


@click.command()
@click.option(
    "--variant",
    type=Spelled([name for name, recipe in VARIANTS.items() if recipe.solved]),
    default="v6",
    help="Recipe whose features and linear probe judge the labels.",
)
@data_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("audit"),
    help="Folder for suspects.csv and report.html.",
)
@combine(*(recipe_option(each) for each in fields(Recipe) if each.name in AUDIT_FIELDS))
@experiment_option
@runtime_option
def audit_labels(
    variant: str,
    data: str,
    image_root: Path | None,
    out: Path,
    experiment: str,
    runtime: str,
    **options: Any,
) -> None:
    """Find images whose label is in doubt, and show them on a page.

    Every image outside the test split is predicted by a linear probe that was fitted without it and
    its copies. suspects.csv lists the labels that these predictions doubt, with the label that they
    suggest, the strongest doubt first; report.html shows the pictures. A doubt is not an error:
    look before you correct a label. Test images are never looked at. Needs `pip install cleanlab`.

    `har run --variant v6 --suspects leave_out` trains without these images.
    """
    check_output_folder(out, AUDIT)
    split = pop_split(options)
    overrides = {name: value for name, value in options.items() if value is not None}
    requested = build_recipe(variant, overrides)
    found = find_named_data(data)
    from har.training.suspects import check_cleanlab

    check_cleanlab()
    from har.tracking.store import open_experiment

    open_experiment(experiment)
    from har.data.prepare import load_manifest
    from har.data.report import REPORT_FILE
    from har.jobs.audit_labels import run_audit
    from har.training.job import build_job

    manifest = load_manifest(found, split, image_root=image_root)
    job = build_job(variant, requested, overrides, manifest, runtime)
    given = {"variant": variant, "data": data, "image_root": image_root, **split, **overrides}
    commands = (
        spell_command("audit-labels", {**given, "out": out}),
        spell_command("run", {**given, "suspects": "leave_out"}),
    )
    audited = run_audit(job, out, experiment, process_start(), commands)
    show(f"{len(audited.suspects):,} of {audited.images:,} labels are in doubt")
    show(for_terminal(str(out / REPORT_FILE)))


@click.command()
@click.option(
    "--clear",
    is_flag=True,
    help="Delete all features that no process is using, and the graphs of served models.",
)
def cache(clear: bool) -> None:
    """List or delete the cached features, most recently used first.

    They are in $HAR_CACHE/features (default ~/.cache/har) and take at most $HAR_CACHE_GB gigabytes
    (default 20); the least recently used ones are deleted first. The last 8 served models' graphs
    are kept too, for a quick start. Backups of interrupted trainings and data folders copied from
    a URL are listed, and --clear keeps them.
    """
    from har.data.download import describe_downloads
    from har.inference.graph_cache import clear_graphs
    from har.training import feature_cache
    from har.training.backup_folders import describe_backups

    if clear:
        show(f"freed {format_bytes(feature_cache.clear_cache() + clear_graphs())}")
    show("\n".join([feature_cache.describe_cache(), *describe_backups(), *describe_downloads()]))


COMMANDS = (variants, sample, prepare, audit_labels, cache)
