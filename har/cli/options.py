"""The options of the commands. Those of a recipe are made from its fields."""

import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from har.recipe import VARIANTS, Recipe
from har.util.errors import UserError

Command = Callable[..., None]
LOCAL_STORE = "sqlite:///mlflow.db"
SPLIT_OPTIONS = ("test_fraction", "split_seed", "duplicates", "test_file")


class Spelled(click.Choice[str]):
    """A choice whose values are spelled as they are, whatever happens to option names."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        """The choice itself."""
        return str(choice)


class Between(click.FloatRange):
    """A number between bounds; NaN is between none, whatever comparisons say."""

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is no number between {self.min} and {self.max}.", param, ctx)
        return number


def with_dashes(name: str) -> str:
    """`--batch_size` and `--batch-size` are one option."""
    return name.replace("_", "-")


def recipe_options(command: Command) -> Command:
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
    kind = click.IntRange if each.type is int else Between
    return kind(each.metadata["low"], each.metadata["high"])


def data_options(command: Command) -> Command:
    """Where the images come from, and how test images are held out."""
    options = [
        click.option(
            "--data",
            default="auto",
            show_default=True,
            metavar="auto|sample|kaggle|DIR",
            help="auto: $HAR_DATA, else Kaggle's input folder, else ./data, else the built-in"
            " sample. DIR: Kaggle's layout, a folder of images for each label, or what"
            " `har prepare` wrote.",
        ),
        click.option(
            "--image-root",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="DIR",
            help="Where the images of a prepared folder lie now, if they were moved.",
        ),
        click.option(
            "--test-fraction",
            type=Between(0, 0.9),
            help="Share of the images held out for test; 0: none, as in the notebooks.  [0.15]",
        ),
        click.option(
            "--split-seed",
            type=click.IntRange(0, 2**31 - 1),
            help="Which images are test and which validation; --seed is training's.  [0]",
        ),
        click.option(
            "--duplicates",
            type=Spelled(["near", "exact", "ignore"]),
            help="Which copies no split parts: those that look alike, only byte-identical ones,"
            " or none, as in the notebooks.  [near]",
        ),
        click.option(
            "--test-file",
            metavar="FILE",
            help="CSV (filename,label) of labelled images in the data's folder test/: these are"
            " the test split.  [none]",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def typed_split(options: dict[str, Any]) -> dict[str, Any]:
    """Take the split's options out of `options`; those that were typed."""
    given = {name: options.pop(name) for name in SPLIT_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def experiment_option(command: Command) -> Command:
    """Where a run is recorded."""
    return click.option(
        "--experiment",
        default="har",
        show_default=True,
        help="MLflow experiment; under `mlflow run` give --experiment-name to mlflow instead.",
    )(offline_option(command))


def offline_option(command: Command) -> Command:
    """Which store is used."""
    return click.option(
        "--offline",
        is_flag=True,
        expose_value=False,
        callback=record_here,
        help=f"Use {LOCAL_STORE} in this folder, whatever MLFLOW_TRACKING_URI says; for what is"
        " recorded there, give it to the commands that read it too.",
    )(command)


def record_here(ctx: click.Context, option: click.Parameter, offline: bool) -> None:
    """Before MLflow is loaded: this process and those that it starts use the local store."""
    if not offline:
        return
    if "MLFLOW_RUN_ID" in os.environ:
        raise UserError("--offline is not for `mlflow run`, which has opened its run already")
    os.environ["MLFLOW_TRACKING_URI"] = LOCAL_STORE


def model_option(command: Command) -> Command:
    """Which model answers."""
    return click.option(
        "--model",
        default="models:/har@champion",
        show_default=True,
        help="A model URI such as runs:/RUN_ID/model, or a folder.",
    )(command)


def flag(name: str, help: str) -> Callable[[Command], Command]:
    """One that `mlflow run` can give too: it can only write --name true."""
    return click.option(
        name,
        type=click.BOOL,
        is_flag=False,
        flag_value=True,
        default=False,
        metavar="",
        help=help,
    )


def runtime_option(command: Command) -> Command:
    """What computes forward passes."""
    return click.option(
        "--runtime",
        type=Spelled(["auto", "tensorflow", "openvino"]),
        default="auto",
        show_default=True,
        help="What computes the logged model's forward pass, here and where it is served, and the"
        " loader features'. openvino is faster on CPUs (pip install openvino). auto: tensorflow"
        " serves; features are computed by openvino on a CPU where it is installed.",
    )(command)


def training_options(command: Command) -> Command:
    """The options that `run` and `train` share."""
    for decorate in (runtime_option, experiment_option, recipe_options, data_options):
        command = decorate(command)
    return click.option(
        "--variant",
        type=Spelled(list(VARIANTS)),
        default="v3",
        show_default=True,
        help="Which notebook's recipe; the options below change it.",
    )(command)
