"""The command line. Every heavy import is inside a command: `har --help` answers at once."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click

from har import __version__
from har.errors import UserError
from har.interrupts import treat_sigterm_as_ctrl_c
from har.progress import quiet_loading
from har.recipe import VARIANTS, Recipe


class Commands(click.Group):
    """A group that turns a user's mistake into one line and exit status 2."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command; a mistake needs no stack trace, anything else is our bug."""
        treat_sigterm_as_ctrl_c()
        status = 0
        try:
            # --help and --version come back as a status, commands as None
            status = super().main(*args, **{**options, "standalone_mode": False}) or 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
        except click.ClickException as error:
            click.echo(f"error: {error.format_message()}", err=True)
            status = 2
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            status = 2
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nstopped", err=True)
            status = 130
        sys.exit(status)


class Spelled(click.Choice[str]):
    """A choice whose values are spelled as they are, whatever happens to option names."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        """The choice itself."""
        return str(choice)


def with_dashes(name: str) -> str:
    """`--batch_size` and `--batch-size` are one option."""
    return name.replace("_", "-")


@click.group(cls=Commands, context_settings={"token_normalize_func": with_dashes})
@click.version_option(__version__, prog_name="har")
def main() -> None:
    """Human action recognition from still images, as one MLflow-tracked experiment.

    \b
    har run                    the whole job on the built-in sample
    har run --variant v4 --data DIR
    har variants               what the variants are
    """


def recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each field of Recipe. Left out, it keeps the variant's value."""
    for each in reversed(fields(Recipe)):
        option = click.option(
            f"--{with_dashes(each.name)}",
            each.name,
            type=option_type(each),
            default=None,
            help=each.metadata["help"],
        )
        command = option(command)
    return command


def option_type(each: Any) -> click.ParamType[Any]:
    """The click type of a recipe field."""
    if get_origin(each.type) is Literal:
        return Spelled(get_args(each.type))
    if each.type is str:
        return click.STRING
    kind = click.IntRange if each.type is int else click.FloatRange
    return kind(each.metadata["low"], each.metadata["high"])


def data_option(command: Callable[..., None]) -> Callable[..., None]:
    """Where the images come from."""
    return click.option(
        "--data",
        default="auto",
        show_default=True,
        metavar="auto|sample|kaggle|DIR",
        help="auto: $HAR_DATA, else Kaggle's input folder, else ./data, else the built-in"
        " sample. DIR: Kaggle's layout, or what `har prepare` wrote.",
    )(command)


def split_options(command: Callable[..., None]) -> Callable[..., None]:
    """How test images are held out of a raw folder."""
    fraction = click.option(
        "--test-fraction",
        type=click.FloatRange(0, 0.9),
        help="Share of the images held out for test; 0: none, as in the notebooks.  [0.15]",
    )
    seed = click.option(
        "--split-seed",
        type=click.IntRange(0, 2**31 - 1),
        help="Which images are test and which validation; --seed is training's.  [0]",
    )
    return fraction(seed(command))


def experiment_option(command: Callable[..., None]) -> Callable[..., None]:
    """Where a run is recorded."""
    return click.option(
        "--experiment",
        default="har",
        show_default=True,
        help="MLflow experiment; under `mlflow run` give --experiment-name to mlflow instead.",
    )(command)


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
@data_option
@split_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("prepared"),
    show_default=True,
    help="Gets manifest.csv and dataset.json; images stay where they are.",
)
def prepare(data: str, test_fraction: float | None, split_seed: int | None, out: Path) -> None:
    """Check every image, group duplicates, hold out the test split."""
    from har import prepare as preparing
    from har.sources import find_source

    preparing.prepare(
        find_source(data),
        out,
        preparing.TEST_FRACTION if test_fraction is None else test_fraction,
        preparing.SPLIT_SEED if split_seed is None else split_seed,
    )
    click.echo(out)


def train_and_report(
    variant: str,
    data: str,
    test_fraction: float | None,
    split_seed: int | None,
    experiment: str,
    **options: Any,
) -> None:
    """What `run` and `train` do."""
    typed = {name: value for name, value in options.items() if value is not None}
    requested = replace(VARIANTS[variant], **typed)

    with quiet_loading():
        from har.experiment import build_trial, run_trial
        from har.prepare import load_manifest

    manifest = load_manifest(data, test_fraction, split_seed)
    trial = build_trial(variant, requested, typed, manifest)
    click.echo(describe_outcome(run_trial(trial, experiment, started_at())))


def repeat_and_report(like: str, data: str, experiment: str) -> None:
    """What `train --like` does: the recipe and the split come from the run."""
    with quiet_loading():
        from har.experiment import build_trial, run_trial
        from har.prepare import load_manifest
        from har.recorded import check_same_data, load_past

    past = load_past(like)
    manifest = load_manifest(data, default=past.split)
    check_same_data(past, manifest)
    every_field = [each.name for each in fields(Recipe)]
    trial = build_trial(past.variant, past.recipe, every_field, manifest)
    click.echo(describe_outcome(run_trial(trial, experiment, started_at())))


def started_at() -> float:
    """When this process began, in seconds since the epoch: imports count as waiting too."""
    import psutil

    return psutil.Process().create_time()


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `run` and `train` share."""
    for decorate in (experiment_option, recipe_options, split_options, data_option):
        command = decorate(command)
    return click.option(
        "--variant",
        type=Spelled(list(VARIANTS)),
        default="v3",
        show_default=True,
        help="Which notebook's recipe; the options below change it.",
    )(command)


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
@training_options
def train(like: str | None, **options: Any) -> None:
    """Train a variant and judge it, as `run` does; or repeat a recorded run."""
    if like is None:
        train_and_report(**options)
        return
    # mlflow's entry point always gives a variant, so that one is not held against the user
    given = {name for name, value in options.items() if value is not None}
    if extra := given - {"variant", "data", "experiment"}:
        names = ", ".join(f"--{with_dashes(name)}" for name in sorted(extra))
        raise UserError(f"--like repeats a run as it was: leave out {names}")
    repeat_and_report(like, options["data"], options["experiment"])


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
        "wall time": f"{minutes} min {seconds:02} s",
        "run id": outcome.run_id,
    }
    widths = [max(len(name), len(value)) for name, value in row.items()]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip()
        for texts in (row.keys(), row.values())
    ]
    return "\n".join(
        [
            *lines,
            f"changed from {outcome.variant}: {outcome.changed}",
            f"see it: {describe_ui(outcome.tracking_uri)}",
        ]
    )


def describe_ui(tracking_uri: str) -> str:
    """How to open the MLflow UI on the store that holds the run."""
    if tracking_uri.startswith(("http://", "https://")):
        return tracking_uri
    # by the interpreter, since mlflow may not be on PATH; one worker needs a quarter of the memory
    python = os.path.relpath(sys.executable)
    program = shlex.quote(python if not python.startswith("..") else sys.executable)
    store = shlex.quote(tracking_uri)
    command = f"{program} -m mlflow server --backend-store-uri {store} --workers 1"
    return f"{command}  then open http://127.0.0.1:5000"


@main.command()
@click.option("--run-id", help="A finished training run.")
@click.option("--model", help="A model URI such as models:/har@champion, or a folder.")
@data_option
@split_options
@experiment_option
def evaluate(
    run_id: str | None,
    model: str | None,
    data: str,
    test_fraction: float | None,
    split_seed: int | None,
    experiment: str,
) -> None:
    """Judge a trained model on the test split, and record it as a run of its own."""
    if (run_id is None) == (model is None):
        raise UserError("say which model: either --run-id ID or --model URI")
    with quiet_loading():
        from har.experiment import evaluate_logged
        from har.prepare import load_manifest
        from har.recorded import load_logged

    uri = model or f"runs:/{run_id}/model"
    logged = load_logged(uri)
    # the images that the model's own run held out, unless told otherwise
    manifest = load_manifest(data, test_fraction, split_seed, logged.split)
    evaluation = evaluate_logged(logged, manifest, experiment)
    click.echo(evaluation.per_class.to_string(index=False, float_format="{:.3f}".format))
    for name, value in asdict(evaluation.scores).items():
        click.echo(f"{name:<18} {value:.4f}")


if __name__ == "__main__":
    sys.exit(main())
