"""The command line. Every heavy import is inside a command: `har --help` answers at once."""

import errno
import gc
import json
import os
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from har import __version__
from har.errors import UserError, first_line
from har.interrupts import treat_sigterm_as_ctrl_c
from har.options import (
    Between,
    Spelled,
    data_options,
    experiment_option,
    flag,
    model_option,
    offline_option,
    recipe_options,
    runtime_option,
    training_options,
    typed_split,
    with_dashes,
)
from har.progress import quiet_loading, say, warn
from har.recipe import VARIANTS, Recipe

# A network and its graph are hundreds of thousands of Python objects that live to the end. Looking
# through them after every 700, as Python does, takes a quarter of the time they are made in.
OBJECTS_BETWEEN_COLLECTIONS = 50_000
# What the system says of a full disk, a folder that may not be read or written, and too little
# memory: no bug of ours wherever it is met.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM}


class Commands(click.Group):
    """A group that turns a user's mistake into one line and exit status 2."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command; a mistake needs no stack trace, anything else is our bug."""
        treat_sigterm_as_ctrl_c()
        gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
        status = 0
        try:
            # --help and --version come back as a status, commands as None
            status = super().main(*args, **{**options, "standalone_mode": False}) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
        except click.ClickException as error:
            say(f"error: {error.format_message()}")
            status = 2
        except UserError as error:
            say(f"error: {error}")
            status = 2
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            say(f"error: {first_line(error)}")
            status = 2
        except (KeyboardInterrupt, click.Abort):
            say("\nstopped")
            status = 130
        sys.exit(status)


@click.group(cls=Commands, context_settings={"token_normalize_func": with_dashes})
@click.version_option(__version__, prog_name="har")
def main() -> None:
    """Human action recognition from still images, as one MLflow-tracked experiment.

    \b
    har run                    the whole job; without data of yours, on a drawn sample
    har run --variant v4 --data DIR
    har variants               what the variants are
    """


@main.command()
def variants() -> None:
    """Print the variants: each notebook, and what it changes from the one before."""
    from har.notebooks import describe_variants

    click.echo(describe_variants())


@main.command()
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
    from har.sources import draw_sample

    click.echo(draw_sample(out, per_class, test_images, seed))


@main.command()
@data_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("prepared"),
    show_default=True,
    help="Gets manifest.csv, dataset.json and report.html; images stay where they are.",
)
@experiment_option
def prepare(data: str, images: Path | None, out: Path, experiment: str, **options: Any) -> None:
    """Check every image, group copies, hold out the test split, and record what was found.

    A prepared folder with --images is written anew for images that were moved.
    """
    with quiet_loading():
        from har.experiment import run_preparation

    run_preparation(data, typed_split(options), images, out, experiment, started_at())
    click.echo(out)


def train_and_report(
    variant: str, data: str, images: Path | None, experiment: str, runtime: str, **options: Any
) -> None:
    """What `run` and `train` do."""
    split = typed_split(options)
    typed = {name: value for name, value in options.items() if value is not None}
    requested = replace(VARIANTS[variant], **typed)

    with quiet_loading():
        from har.prepare import load_manifest
        from har.store import check_store
        from har.trials import build_trial, run_trial

    check_store(experiment)
    manifest = load_manifest(data, split, images=images)
    trial = build_trial(variant, requested, typed, manifest, runtime)
    click.echo(describe_outcome(run_trial(trial, experiment, started_at())))


def repeat_and_report(
    like: str, data: str, images: Path | None, experiment: str, runtime: str
) -> None:
    """What `train --like` does: the recipe and the split come from the run."""
    with quiet_loading():
        from har.prepare import load_manifest
        from har.recorded import check_same_data, load_past
        from har.runtimes import AUTO
        from har.store import check_store
        from har.trials import build_trial, run_trial

    check_store(experiment)
    past = load_past(like)
    manifest = load_manifest(data, default=past.split, images=images)
    check_same_data(past, manifest)
    every_field = [each.name for each in fields(Recipe)]
    features = None
    # what it was computed by, unless another runtime was typed
    if runtime == AUTO:
        runtime, features = past.runtime, past.feature_runtime
    trial = build_trial(past.variant, past.recipe, every_field, manifest, runtime, features)
    click.echo(describe_outcome(run_trial(trial, experiment, started_at())))


def resume_and_report(ctx: click.Context, run_id: str) -> None:
    """What `train --resume` does: all but where the images lie comes from the backup."""
    if "MLFLOW_RUN_ID" in os.environ:
        raise UserError(
            "--resume is not for `mlflow run`, which has opened another run:"
            f" har train --resume {run_id}"
        )
    typed = {
        name: value
        for name, value in ctx.params.items()
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    images = typed.pop("images", None)
    recipe = {each.name for each in fields(Recipe)}
    if extra := typed.keys() - recipe - {"resume"}:
        names = ", ".join(f"--{with_dashes(name)}" for name in sorted(extra))
        raise UserError(f"--resume goes on with a run as it was: leave out {names}")
    with quiet_loading():
        from har.trials import resume_trial

    asked = {name: value for name, value in typed.items() if name in recipe}
    click.echo(describe_outcome(resume_trial(run_id, asked, images, started_at())))


def started_at() -> float:
    """When this process began, in seconds since the epoch: imports count as waiting too."""
    import psutil

    return psutil.Process().create_time()


@main.command()
@training_options
def run(**options: Any) -> None:
    """The main job: prepare the images, train, judge on test, record in MLflow."""
    train_and_report(**options)


@main.command()
@click.option(
    "--like",
    metavar="RUN_ID",
    help="Repeat a recorded run: its variant, recipe and split, on the same images. On a CPU the"
    " numbers come out equal.",
)
@click.option(
    "--resume",
    metavar="RUN_ID",
    help="Go on with a training that was cut short, in the same run, from its last backup in the"
    " cache on this machine. On a CPU the numbers come out as if it had never stopped.",
)
@training_options
@click.pass_context
def train(ctx: click.Context, /, like: str | None, resume: str | None, **options: Any) -> None:
    """Train a variant and judge it, as `run` does; repeat a recorded run; or go on with one."""
    if resume is not None:
        resume_and_report(ctx, resume)
        return
    if like is None:
        train_and_report(**options)
        return
    # mlflow's entry point always gives a variant, so that one is not held against the user
    kept = {name: options.pop(name) for name in ("data", "images", "experiment", "runtime")}
    given = {name for name, value in options.items() if value is not None}
    if extra := given - {"variant"}:
        names = ", ".join(f"--{with_dashes(name)}" for name in sorted(extra))
        raise UserError(f"--like repeats a run as it was: leave out {names}")
    repeat_and_report(like, **kept)


@main.command()
@offline_option
def sync() -> None:
    """Record finished trainings that the tracking server was not there for, from their backups."""
    with quiet_loading():
        from har.trials import sync_trainings

    outcome = None
    for outcome in sync_trainings(started_at()):
        click.echo(describe_outcome(outcome))
    if outcome is None:
        click.echo("nothing to record")


def describe_outcome(outcome: Any) -> str:
    """The short table at the end, and how to see more."""
    scores = outcome.scores
    if scores:
        interval = f"{scores.accuracy_low:.1%} to {scores.accuracy_high:.1%}"
        accuracy = f"{scores.accuracy:.1%} ({interval})"
        top_3 = f"{scores.top_3_accuracy:.1%}"
    else:
        accuracy, top_3 = "no test split", "-"
    minutes, seconds = divmod(round(outcome.wall_time_s), 60)
    row = {
        "variant": outcome.variant,
        "hardware": outcome.hardware,
        "accuracy (95 % interval)": accuracy,
        "top-3": top_3,
        "wall time": f"{minutes} min {seconds:02} s" + (" (warm)" if outcome.warm else ""),
        "run id": outcome.run_id,
    }
    widths = [max(len(name), len(value)) for name, value in row.items()]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip()
        for texts in (row.keys(), row.values())
    ]
    if outcome.warm:
        lines.append("warm: features were found in the cache, so this is not the whole job's time")
    return "\n".join(
        [
            *lines,
            f"changed from {outcome.variant}: {outcome.changed}",
            f"see it: {outcome.see}",
        ]
    )


@main.command()
@click.option("--run-id", help="A finished training run.")
@click.option("--model", help="A model URI such as models:/har@champion, or a folder.")
@click.option(
    "--robustness-images",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="At most so many test images are judged again shifted, mirrored, blurred and with"
    " stronger JPEG compression; 0: none.",
)
@data_options
@experiment_option
def evaluate(
    run_id: str | None,
    model: str | None,
    data: str,
    images: Path | None,
    experiment: str,
    robustness_images: int,
    **options: Any,
) -> None:
    """Judge a trained model on the test split, and record it as a run of its own."""
    if (run_id is None) == (model is None):
        raise UserError("say which model: either --run-id ID or --model URI")
    with quiet_loading():
        from har.experiment import evaluate_logged
        from har.prepare import load_manifest
        from har.recorded import load_logged
        from har.robustness import format_table
        from har.store import check_store

    check_store(experiment)
    uri = model or f"runs:/{run_id}/model"
    logged = load_logged(uri)
    # the images that the model's own run held out, unless told otherwise
    manifest = load_manifest(data, typed_split(options), logged.split, images)
    evaluation, robustness = evaluate_logged(logged, manifest, experiment, robustness_images)
    click.echo(evaluation.per_class.to_string(index=False, float_format="{:.3f}".format))
    for name, value in asdict(evaluation.scores).items():
        click.echo(f"{name:<18} {value:.4f}")
    if robustness is not None:
        click.echo(format_table(robustness))


@main.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@click.option("--url", help="Ask this running server instead, such as http://127.0.0.1:5001.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with top_3.")
@offline_option
def classify(images: tuple[Path, ...], model: str, url: str | None, as_json: bool) -> None:
    """Say what people do in IMAGES: files, or folders of them."""
    from har.prediction import classify_files, find_images, format_row

    paths = find_images(images)
    if url is None:
        with quiet_loading():
            from har.recorded import load_logged
        answer: Any = load_logged(model).classifier.classify
    else:
        from har.client import ask_server

        answer = partial(ask_server, url)
    for row in classify_files(paths, answer):
        click.echo(json.dumps(row) if as_json else format_row(row))


@main.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Kaggle's layout, of which test/ is scored, or a folder of images.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("predictions.csv"),
    show_default=True,
    help="A new .csv or .parquet file: filename, label, probability, error.",
)
@model_option
@offline_option
def predict(data: Path, out: Path, model: str) -> None:
    """Score many unlabelled images into a file; interrupted, the same command goes on."""
    with quiet_loading():
        from har.prediction import predict_to_file
        from har.recorded import load_logged

    logged = load_logged(model)
    bad = predict_to_file(data, out, logged.classifier.classify, logged.identity)
    if bad:
        warn(f"{bad} images have no label; the column error says why")
    click.echo(out)


@main.command()
@click.option(
    "--experiment",
    help="MLflow experiment whose trainings are the candidates.  [har; under `mlflow run` the"
    " one that was given to mlflow]",
)
@click.option(
    "--select",
    type=Spelled(["auto", "validation", "test"]),
    default="auto",
    show_default=True,
    help="Accuracy that selects the candidate; auto: validation where a run has one, else test.",
)
@click.option(
    "--test-digest",
    help="Only runs judged on these test images.  [the champion's, else the newest run's]",
)
@click.option(
    "--level",
    type=Between(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="The candidate is better if McNemar's exact test gives a p-value below this.",
)
@flag(
    "--start-over",
    "For other images or labels than the champion's: the best run on the newest run's test images"
    " takes its place without a comparison.",
)
@flag("--dry-run", "Only say what would be done; the model is tried all the same.")
@offline_option
def promote(experiment: str | None, dry_run: bool, **options: Any) -> None:
    """Make the best run the champion, if it beats the present one on the same test images.

    Its model is then served and asked as models:/har@champion, and the one before it is
    models:/har@previous-champion. A candidate that is not better, by a paired test, changes
    nothing and is no error.
    """
    from har.choosing import Rules
    from har.promotion import promote as promote_best
    from har.store import check_store

    check_store()
    click.echo(promote_best(experiment, Rules(**options), dry_run))


@main.command()
@offline_option
def champion() -> None:
    """Show the present champion: its run, variant, hardware, accuracy and latency."""
    from har.promotion import describe_champion
    from har.store import check_store

    check_store()
    click.echo(describe_champion())


def variant_option(name: str, field: str, default: str, help: str) -> Any:
    """One end of an ablation."""
    kind = Spelled(list(VARIANTS))
    return click.option(name, field, type=kind, default=default, show_default=True, help=help)


@main.command()
@variant_option("--from", "from_variant", "original", "Where the changes start.")
@variant_option("--to", "to_variant", "v4", "Where they end; the options below change both.")
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Trainings of each recipe, from --seed on: what is told is their mean or median.",
)
@data_options
@recipe_options
@experiment_option
@runtime_option
def ablate(data: str, images: Path | None, **options: Any) -> None:
    """Find out which change between two variants buys what.

    Trains the two, each single change on the first, the second without each, and the chain of
    changes: two dozen trainings for original to v4, so begin with few --epochs. Interrupted, the
    same command goes on; finished trainings of the experiment count.
    """
    split = typed_split(options)
    own = ("from_variant", "to_variant", "seeds", "experiment", "runtime")
    kept = {name: options.pop(name) for name in own}
    typed = {name: value for name, value in options.items() if value is not None}

    with quiet_loading():
        from har.ablation_runs import Ablation, run_ablation
        from har.prepare import load_manifest
        from har.store import check_store

    check_store(kept["experiment"])
    manifest = load_manifest(data, split, images=images)
    click.echo(run_ablation(Ablation(manifest=manifest, typed=typed, **kept)))


@main.command()
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
        from har.experiment import run_comparison
        from har.store import check_store

    check_store()
    named = [*run_ids, *(each.strip() for each in runs.split(",") if each.strip())]
    click.echo(run_comparison(named, experiment, out))


@main.command()
@experiment_option
def import_notebooks(experiment: str) -> None:
    """Record the five published notebook runs, to stand beside measured ones; once is enough.

    Their times are of other hardware and other images, their accuracy is of training images.
    """
    with quiet_loading():
        from har.published import import_notebooks
        from har.store import check_store

    check_store(experiment)
    for variant, run_id in import_notebooks(experiment).items():
        click.echo(f"{variant:<10}{run_id}")


@main.command()
@click.argument("run_id")
@offline_option
def twins(run_id: str) -> None:
    """Compare a training with those of the same recipe and data on other hardware.

    Each becomes a tag and a line in the description of the other; deleted ones are forgotten.
    """
    with quiet_loading():
        from har.store import check_store
        from har.twins import describe_twins, link_twins

    check_store()
    click.echo(describe_twins(*link_twins(run_id)))


@main.command()
@click.option("--clear", is_flag=True, help="Delete every entry that no process is at work on.")
def cache(clear: bool) -> None:
    """List the features kept on disk, the last used first; or delete them.

    They lie in $HAR_CACHE/features (~/.cache/har) and take at most $HAR_CACHE_GB gigabytes (20);
    what was not used for longest goes first. Backups of trainings that were cut short are listed
    too; --clear leaves them.
    """
    from har import feature_cache
    from har.backup import describe_backups

    if clear:
        click.echo(f"freed {feature_cache.clear() / 1e6:,.1f} MB")
    click.echo("\n".join([feature_cache.describe_cache(), *describe_backups()]))


if __name__ == "__main__":
    sys.exit(main())
