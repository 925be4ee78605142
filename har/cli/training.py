"""Commands that train: run, train, sync, ablate, sweep."""

import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from har.cli.options import (
    CLUSTER_OPTIONS,
    Spelled,
    cluster_options,
    data_options,
    experiment_option,
    find_named_data,
    flag,
    offline_option,
    pop_cluster,
    pop_split,
    recipe_options,
    runtime_option,
    training_options,
    with_dashes,
)
from har.cli.tables import describe_training, format_search
from har.recipe import VARIANTS, Recipe, build_recipe
from har.search.space import parse_space
from har.search.study import LOCAL_STORAGE, METRICS, check_optuna
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


def _split_names(text: str) -> tuple[str, ...]:
    """Split `backbone, image-size` into names of fields."""
    names = (each.strip().replace("-", "_") for each in text.split(","))
    return tuple(each for each in names if each)


def _variant_option(name: str, field: str, default: str, help: str) -> Any:
    kind = Spelled(list(VARIANTS))
    return click.option(name, field, type=kind, default=default, help=help)


@click.command()
@_variant_option("--from", "from_variant", "original", "The variant to start from.")
@_variant_option(
    "--to", "to_variant", "v4", "The variant to end at; the recipe options below change both."
)
@click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="FIELD,FIELD",
    callback=lambda ctx, option, texts: tuple(_split_names(text) for text in texts),
    help="Recipe fields to change together, such as backbone,image_size; may be given again.",
)
@flag("--chain-only", "Train only the chain of changes, not each change alone and as the last.")
@click.option(
    "--num-seeds",
    type=click.IntRange(1),
    default=1,
    help="Trainings of each recipe, with seeds from --seed on. Reported are the median time and"
    " the mean accuracy.",
)
@data_options
@recipe_options
@experiment_option
@runtime_option
@cluster_options
def ablate(data: str, image_root: Path | None, **options: Any) -> None:
    """Measure what each single change between two variants does to time and accuracy.

    Trains both variants, each single change added to the first, each single change taken from the
    second, and the chain of changes: two dozen trainings from original to v4, so start with few
    --epochs. If it was interrupted, give the same command again: it reuses finished trainings of
    the experiment.
    """
    split, cluster = pop_split(options), pop_cluster(options)
    own = (
        "from_variant", "to_variant", "groups", "chain_only", "num_seeds", "experiment", "runtime"
    )  # fmt: skip
    kept = {name: options.pop(name) for name in own}
    overrides = {name: value for name, value in options.items() if value is not None}

    found = find_named_data(data)
    from har.tracking.store import open_experiment

    open_experiment(kept["experiment"])
    from har.data.prepare import load_manifest
    from har.jobs.ablate import Ablation, run_ablation

    manifest = load_manifest(found, split, image_root=image_root)
    asked = Ablation(manifest=manifest, overrides=overrides, cluster=cluster, **kept)
    show(run_ablation(asked))


def _list_given(options: dict[str, Any]) -> dict[str, Any]:
    """Return experiment and runtime, where they are not the defaults of `har run`."""
    defaults = {each.name: each.default for each in run.params}
    given = {name: options[name] for name in ("experiment", "runtime")}
    return {name: value for name, value in given.items() if value != defaults[name]}


@click.command()
@click.option(
    "--variant",
    type=Spelled(list(VARIANTS)),
    default="v6",
    help="The variant to search around; the recipe options below hold for all trials.",
)
@click.option(
    "--param",
    "params",
    multiple=True,
    required=True,
    metavar="FIELD=VALUES",
    help="Recipe field to search, and what to try: learning_rate=log:1e-4:1e-2,"
    " label_smoothing=0:0.2 or head=gap_dropout,linear_probe. Give it again, or several in quotes.",
)
@click.option(
    "--trials",
    type=click.IntRange(1, 100_000),
    default=30,
    help="Trials in all, those of interrupted and earlier commands of the same search included.",
)
@click.option(
    "--metric",
    type=Spelled(METRICS),
    default="val_accuracy",
    help="What decides, measured on validation images.",
)
@click.option(
    "--pruning",
    type=Spelled(["median", "none"]),
    default="median",
    help="median: stop a trial that is below the median of the others at the same epoch.",
)
@click.option(
    "--storage",
    default=LOCAL_STORAGE,
    metavar="URL",
    help="Optuna's database. Several processes, or machines, share a search by it.",
)
@data_options
@recipe_options
@experiment_option
@runtime_option
@cluster_options
def sweep(data: str, image_root: Path | None, params: tuple[str, ...], **options: Any) -> None:
    """Search for the best values of recipe fields, by trials on validation images.

    \b
    har sweep --param learning_rate=log:1e-4:1e-2 \
              --param head=gap_dropout,linear_probe --trials 50 --data DIR

    Optuna chooses the values. No trial sees a test image: only the best recipe is evaluated on the
    test split, once, and printed as a command. Trials on features (--loader features) take seconds.
    After Ctrl-C the same command resumes; given in a second terminal meanwhile, it takes part.
    Needs `pip install optuna`.
    """
    own = ("variant", "trials", "metric", "pruning", "storage", "experiment", "runtime")
    kept = {name: options.pop(name) for name in own}
    split, cluster = pop_split(options), pop_cluster(options)
    overrides = {name: value for name, value in options.items() if value is not None}
    space = parse_space(params)
    if both := set(space) & set(overrides):
        raise UserError(f"--param searches {', '.join(sorted(both))}: leave the option out")
    build_recipe(kept["variant"], overrides)
    check_optuna()
    found = find_named_data(data)
    from har.tracking.store import open_experiment

    open_experiment(kept["experiment"])
    from har.data.prepare import load_manifest
    from har.jobs.sweep import run_sweep
    from har.jobs.trials import Sweep

    manifest = load_manifest(found, split, image_root=image_root)
    given = {"data": data, "image_root": image_root, **split, **_list_given(kept)}
    asked = Sweep(
        manifest=manifest, overrides=overrides, space=space, given=given, cluster=cluster, **kept
    )
    show(format_search(run_sweep(asked), asked.metric))


COMMANDS = (run, train, sync, ablate, sweep)
