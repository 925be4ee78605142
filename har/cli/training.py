"""Commands that train one recipe: run, train, sync."""

import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from har.cli.options import (
    CLUSTER_OPTIONS,
    find_named_data,
    offline_option,
    pop_cluster,
    pop_split,
    training_options,
    with_dashes,
)
from har.cli.tables import describe_training
from har.recipe import Recipe, build_recipe
from har.util.errors import UserError
from har.util.process import process_start
from har.util.progress import show, warn

if TYPE_CHECKING:
    from har.tracking.records import Record

RECIPE_FIELDS = tuple(each.name for each in fields(Recipe))


@click.command()
@click.option(
    "--reproduce",
    metavar="RUN_ID",
    help="Repeat a recorded run: its variant, recipe and split, on the same images. On a CPU the"
    " numbers are equal.",
)
@click.option(
    "--resume",
    metavar="RUN_ID",
    help="Resume a training that was cut short, in the same run, from its last backup on this"
    " machine (`har cache` lists them). On a CPU the numbers are those of an uninterrupted"
    " training.",
)
@training_options
@click.pass_context
def run(ctx: click.Context, /, reproduce: str | None, resume: str | None, **options: Any) -> None:
    """Prepare the images, train, evaluate on the test split, and record it all in MLflow.

    Without a GPU, --variant v5 is about 25 times as fast as v3 and at least as accurate.
    """
    if resume is not None:
        record = _resume(ctx, resume, options)
    elif reproduce is not None:
        record = _reproduce(ctx, reproduce, options)
    else:
        record = _train(**options)
    show(describe_training(record))
    if record.dataset == "sample" and options["data"] == "auto":
        warn(
            "this result is of the drawn sample, because no data was found: for photographs give"
            " --data DIR"
        )


train = click.Command(
    "train", callback=run.callback, params=run.params, help="Train and evaluate: same as `har run`."
)


def _check_only(ctx: click.Context, option: str, allowed: Collection[str]) -> None:
    """Raise a UserError if the user gave `option` together with others than those allowed."""
    given = [
        f"--{with_dashes(name)}"
        for name in sorted(ctx.params)
        if name not in (option, *allowed)
        and ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    ]
    if given:
        raise UserError(f"--{option} takes these from the run: leave out {', '.join(given)}")


def _train(
    variant: str,
    data: str,
    image_root: Path | None,
    experiment: str,
    runtime: str,
    run_name: str | None,
    **options: Any,
) -> "Record":
    split, cluster = pop_split(options), pop_cluster(options)
    overrides = {name: value for name, value in options.items() if value is not None}
    requested = build_recipe(variant, overrides)

    found = find_named_data(data)
    from har.tracking.store import open_experiment

    open_experiment(experiment)
    from har.data.prepare import load_manifest
    from har.jobs.train import run_training
    from har.training.job import build_job, check_cluster

    check_cluster(cluster, requested)
    manifest = load_manifest(found, split, image_root=image_root)
    job = build_job(variant, requested, overrides, manifest, runtime, cluster=cluster)
    return run_training(job, experiment, process_start(), run_name=run_name)


def _reproduce(ctx: click.Context, run_id: str, options: dict[str, Any]) -> "Record":
    kept = ("data", "image_root", "experiment", "runtime", "run_name")
    # `mlflow run` always passes a variant, so it does not count
    _check_only(ctx, "reproduce", ("variant", *kept, *CLUSTER_OPTIONS))

    chosen = {name: options[name] for name in kept} | {"cluster": pop_cluster(options)}
    chosen["data"] = find_named_data(options["data"])
    from har.tracking.query import check_readable_store, find_run_id

    check_readable_store()
    from har.jobs.resume import reproduce_training

    return reproduce_training(find_run_id(run_id), started=process_start(), **chosen)


def _resume(ctx: click.Context, run_id: str, options: dict[str, Any]) -> "Record":
    if "MLFLOW_RUN_ID" in os.environ:
        raise UserError(
            "--resume does not work through `mlflow run`, which has opened another run:"
            f" har train --resume {run_id}"
        )
    _check_only(ctx, "resume", ("image_root", *RECIPE_FIELDS, *CLUSTER_OPTIONS))
    cluster = pop_cluster(options)
    recipe = {name: options[name] for name in RECIPE_FIELDS if options[name] is not None}

    from har.jobs.resume import resume_training
    from har.tracking.query import check_readable_store, pick_by_prefix
    from har.training.backup_folders import list_backups

    run_id = pick_by_prefix(run_id, dict.fromkeys(list_backups(), "")) or run_id
    check_readable_store()
    return resume_training(run_id, recipe, options["image_root"], process_start(), cluster)


@click.command()
@offline_option
def sync() -> None:
    """Record finished trainings whose tracking server was away, from their backups."""
    from har.jobs.resume import sync_trainings
    from har.tracking.query import check_readable_store
    from har.training.backup_folders import list_backups

    recorded = []
    if list_backups():
        check_readable_store()
        for record in sync_trainings(process_start()):
            show(describe_training(record))
            recorded.append(record.run_id)
    if not recorded:
        show("nothing to record")


COMMANDS = (run, train, sync)
