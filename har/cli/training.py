"""Commands that train: run, train, sync, ablate."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from har.cli.options import (
    Spelled,
    data_options,
    experiment_option,
    offline_option,
    recipe_options,
    runtime_option,
    training_options,
    typed_split,
    with_dashes,
)
from har.recipe import VARIANTS, Recipe
from har.util.errors import UserError
from har.util.process import process_start
from har.util.progress import quiet_loading


def train_and_report(
    variant: str, data: str, image_root: Path | None, experiment: str, runtime: str, **options: Any
) -> None:
    """What `run` and `train` do."""
    split = typed_split(options)
    overrides = {name: value for name, value in options.items() if value is not None}
    requested = replace(VARIANTS[variant], **overrides)

    with quiet_loading():
        from har.data.prepare import load_manifest
        from har.jobs.train import build_job, run_training
        from har.tracking.store import check_store

    check_store(experiment)
    manifest = load_manifest(data, split, image_root=image_root)
    job = build_job(variant, requested, overrides, manifest, runtime)
    click.echo(describe_outcome(run_training(job, experiment, process_start())))


def reproduce_and_report(
    run_id: str, data: str, image_root: Path | None, experiment: str, runtime: str
) -> None:
    """What `train --reproduce` does: the recipe and the split come from the run."""
    with quiet_loading():
        from har.data.prepare import load_manifest
        from har.inference.runtimes import AUTO
        from har.jobs.train import build_job, run_training
        from har.tracking.records import check_same_data, load_recorded_job
        from har.tracking.store import check_store

    check_store(experiment)
    past = load_recorded_job(run_id)
    manifest = load_manifest(data, default=past.split, image_root=image_root)
    check_same_data(past, manifest)
    every_field = [each.name for each in fields(Recipe)]
    features = None
    # what it was computed by, unless the user named another runtime
    if runtime == AUTO:
        runtime, features = past.runtime, past.feature_runtime
    job = build_job(past.variant, past.recipe, every_field, manifest, runtime, features)
    click.echo(describe_outcome(run_training(job, experiment, process_start())))


def resume_and_report(ctx: click.Context, run_id: str) -> None:
    """What `train --resume` does: all but where the images lie comes from the backup."""
    if "MLFLOW_RUN_ID" in os.environ:
        raise UserError(
            "--resume is not for `mlflow run`, which has opened another run:"
            f" har train --resume {run_id}"
        )
    overrides = {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    image_root = overrides.pop("image_root", None)
    recipe = {each.name for each in fields(Recipe)}
    if extra := overrides.keys() - recipe - {"resume"}:
        names = ", ".join(f"--{with_dashes(name)}" for name in sorted(extra))
        raise UserError(f"--resume continues a run as it was: leave out {names}")
    with quiet_loading():
        from har.jobs.resume import resume_training

    asked = {name: value for name, value in overrides.items() if name in recipe}
    click.echo(describe_outcome(resume_training(run_id, asked, image_root, process_start())))


@click.command()
@training_options
def run(**options: Any) -> None:
    """The main job: prepare the images, train, evaluate on test, record in MLflow."""
    train_and_report(**options)


@click.command()
@click.option(
    "--reproduce",
    metavar="RUN_ID",
    help="Repeat a recorded run: its variant, recipe and split, on the same images. On a CPU the"
    " numbers come out equal.",
)
@click.option(
    "--resume",
    metavar="RUN_ID",
    help="Resume a training that was cut short, in the same run, from its last backup in the"
    " cache on this machine. On a CPU the numbers come out as if it had never stopped.",
)
@training_options
@click.pass_context
def train(ctx: click.Context, /, reproduce: str | None, resume: str | None, **options: Any) -> None:
    """Train a variant and evaluate it, as `run` does; repeat a recorded run; or resume one."""
    if resume is not None:
        resume_and_report(ctx, resume)
        return
    if reproduce is None:
        train_and_report(**options)
        return
    # mlflow's entry point always gives a variant, so that one is not held against the user
    kept = {name: options.pop(name) for name in ("data", "image_root", "experiment", "runtime")}
    given = {name for name, value in options.items() if value is not None}
    if extra := given - {"variant"}:
        names = ", ".join(f"--{with_dashes(name)}" for name in sorted(extra))
        raise UserError(f"--reproduce repeats a run as it was: leave out {names}")
    reproduce_and_report(reproduce, **kept)


@click.command()
@offline_option
def sync() -> None:
    """Record finished trainings that the tracking server was not there for, from their backups."""
    with quiet_loading():
        from har.jobs.resume import sync_trainings

    outcome = None
    for outcome in sync_trainings(process_start()):
        click.echo(describe_outcome(outcome))
    if outcome is None:
        click.echo("nothing to record")


def describe_outcome(outcome: Any) -> str:
    """The short table at the end, and how to see more."""
    scores = outcome.scores
    if scores:
        interval = f"{scores['accuracy_low']:.1%} to {scores['accuracy_high']:.1%}"
        accuracy = f"{scores['accuracy']:.1%} ({interval})"
        top_3 = f"{scores['top_3_accuracy']:.1%}"
    else:
        accuracy, top_3 = "no test split", "-"
    minutes, seconds = divmod(round(outcome.wall_time_s), 60)
    row = {
        "variant": outcome.variant,
        "hardware": outcome.hardware,
        "accuracy (95 % interval)": accuracy,
        "top-3": top_3,
        "wall time": f"{minutes} min {seconds:02} s"
        + (" (cache hit)" if outcome.cache_hit else ""),
        "run id": outcome.run_id,
    }
    widths = [max(len(name), len(value)) for name, value in row.items()]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip()
        for texts in (row.keys(), row.values())
    ]
    if outcome.cache_hit:
        lines.append("cache hit: features were found on disk, so this is not the whole job's time")
    return "\n".join(
        [
            *lines,
            f"differs from {outcome.variant}: {outcome.differs_from_variant}",
            f"see it: {outcome.see}",
        ]
    )


def variant_option(name: str, field: str, default: str, help: str) -> Any:
    """One end of an ablation."""
    kind = Spelled(list(VARIANTS))
    return click.option(name, field, type=kind, default=default, show_default=True, help=help)


@click.command()
@variant_option("--from", "from_variant", "original", "Where the changes start.")
@variant_option("--to", "to_variant", "v4", "Where they end; the options below change both.")
@click.option(
    "--num-seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Trainings of each recipe, from --seed on: what is told is their mean or median.",
)
@data_options
@recipe_options
@experiment_option
@runtime_option
def ablate(data: str, image_root: Path | None, **options: Any) -> None:
    """Find out which change between two variants buys what.

    Trains the two, each single change on the first, the second without each, and the chain of
    changes: two dozen trainings for original to v4, so begin with few --epochs. Interrupted, the
    same command goes on; finished trainings of the experiment count.
    """
    split = typed_split(options)
    own = ("from_variant", "to_variant", "num_seeds", "experiment", "runtime")
    kept = {name: options.pop(name) for name in own}
    overrides = {name: value for name, value in options.items() if value is not None}

    with quiet_loading():
        from har.data.prepare import load_manifest
        from har.jobs.ablate import Ablation, run_ablation
        from har.tracking.store import check_store

    check_store(kept["experiment"])
    manifest = load_manifest(data, split, image_root=image_root)
    click.echo(run_ablation(Ablation(manifest=manifest, overrides=overrides, **kept)))


COMMANDS = (run, train, sync, ablate)
