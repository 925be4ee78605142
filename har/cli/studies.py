"""Commands that train many recipes: ablate, sweep."""

from pathlib import Path
from typing import Any

import click

from har.cli.options import (
    Spelled,
    cluster_options,
    data_options,
    experiment_option,
    find_named_data,
    flag,
    pop_cluster,
    pop_split,
    recipe_options,
    runtime_option,
)
from har.cli.tables import format_search
from har.cli.training import run
from har.recipe import VARIANTS, build_recipe
from har.search.space import parse_space
from har.search.study import LOCAL_STORAGE, METRICS, check_optuna
from har.util.errors import UserError
from har.util.progress import show


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


COMMANDS = (ablate, sweep)
