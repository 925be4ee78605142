"""Options that several commands share. Those of a recipe are made from its fields."""

import math
import os
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from har.recipe import VARIANTS, Recipe
from har.util.errors import UserError
from har.util.outputs import LOCAL_STORE
from har.util.ray_cluster import Cluster, check_ray

if TYPE_CHECKING:
    from har.data.layouts import Source

Command = Callable[..., None]
CLUSTER_OPTIONS = ("executor", "ray_address", "workers")
SPLIT_OPTIONS = ("test_fraction", "split_seed", "duplicates", "test_file", "label_spelling")


class Spelled(click.Choice[str]):
    """A choice whose values keep their underscores, while option names get dashes."""

    def normalize_choice(self, choice: Any, ctx: click.Context | None) -> str:
        """Return the choice unchanged."""
        return str(choice)


class Between(click.FloatRange):
    """A number within bounds. NaN is refused: it passes every comparison with a bound."""

    def convert(self, value: Any, param: Any, ctx: click.Context | None) -> float:
        """Parse the number, or fail with the bounds in the message."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is no number between {self.min} and {self.max}.", param, ctx)
        return number


def with_dashes(name: str) -> str:
    """Spell a name as options are spelled: `batch_size` as `batch-size`."""
    return name.replace("_", "-")


def combine(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Combine options into one decorator; `--help` lists them in this order."""

    def add_all(command: Command) -> Command:
        for add in reversed(options):
            command = add(command)
        return command

    return add_all


def flag(name: str, help: str) -> Callable[[Command], Command]:
    """Build a flag that also takes a value: `mlflow run` can only write `--name true`."""
    return click.option(
        name, type=bool, is_flag=False, flag_value=True, default=False, show_default=False,
        metavar="", help=help,
    )  # fmt: skip


def recipe_option(each: Field[Any]) -> Callable[[Command], Command]:
    """Build the option of a field of Recipe. Left out, it keeps the variant's value."""
    return click.option(
        f"--{with_dashes(each.name)}",
        each.name,
        type=_option_type(each),
        help=f"{each.metadata['help']}.  [{_describe_defaults(each)}]",
    )


def _describe_defaults(each: Field[Any]) -> str:
    # `40` where all variants agree, else `original, v1: 0; v2, v3: 5`
    variants: dict[Any, list[str]] = {}
    for name, recipe in VARIANTS.items():
        variants.setdefault(getattr(recipe, each.name), []).append(name)
    if len(variants) == 1:
        return str(next(iter(variants)))
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in variants.items())


def _option_type(each: Field[Any]) -> click.ParamType[Any]:
    if get_origin(each.type) is Literal:
        return Spelled(get_args(each.type))
    if each.type is str:
        return click.STRING
    kind = click.IntRange if each.type is int else Between
    return kind(each.metadata["low"], each.metadata["high"])


def _use_local_store(ctx: click.Context, option: click.Parameter, offline: bool) -> None:
    """Set the store for this process and its children, before MLflow is loaded."""
    if not offline:
        return
    if "MLFLOW_RUN_ID" in os.environ:
        raise UserError(
            "--offline does not work through `mlflow run`, which has opened its run already"
        )
    os.environ["MLFLOW_TRACKING_URI"] = LOCAL_STORE


offline_option = click.option(
    "--offline",
    is_flag=True,
    expose_value=False,
    callback=_use_local_store,
    help=f"Use {LOCAL_STORE} in this folder instead of MLFLOW_TRACKING_URI. Give it again to"
    " commands that read these runs.",
)
# Where a run is recorded.
experiment_option = combine(
    click.option(
        "--experiment",
        default="har",
        help="MLflow experiment to record in. Under `mlflow run`, give --experiment-name to mlflow"
        " instead.",
    ),
    offline_option,
)
# Which trainings `promote` and `compare` read.
experiment_to_read_option = combine(
    click.option(
        "--experiment",
        help="MLflow experiment whose trainings are read.  [har; under `mlflow run` that run's]",
    ),
    offline_option,
)
model_option = click.option(
    "--model",
    default="models:/har@champion",
    help="A model URI such as models:/har@champion, a run id, or a folder.",
)
runtime_option = click.option(
    "--runtime",
    type=Spelled(["auto", "tensorflow", "openvino"]),
    default="auto",
    help="Computes the forward passes of the logged model and of --loader features. openvino is"
    " faster on CPUs (pip install openvino). auto: tensorflow for the model; for features openvino"
    " on a CPU where it is installed.",
)
# Where work runs.
cluster_options = combine(
    click.option(
        "--executor",
        type=Spelled(["local", "ray"]),
        default="local",
        help="ray: work on a Ray cluster, whose machines see the images under the same paths or"
        " URLs (pip install 'ray[data]').",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="For --executor ray: the cluster.  [$RAY_ADDRESS, else one on this machine]",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="For --executor ray: how many processes compute.  [one on each GPU, else on each"
        " machine; for predict two on each]",
    ),
)
recipe_options = combine(*map(recipe_option, fields(Recipe)))
# Where the images come from, and how test images are held out.
data_options = combine(
    click.option(
        "--data",
        default="auto",
        metavar="auto|sample|kaggle|DIR|URL",
        help="DIR: Kaggle's layout, a folder of images for each label, or a folder that `har"
        " prepare` wrote. URL: such a folder elsewhere, as s3://BUCKET/FOLDER; it is copied into"
        " the cache, later only what changed. auto: the first of $HAR_DATA, Kaggle's input folder,"
        " ./data, and the built-in sample.",
    ),
    click.option(
        "--image-root",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="New place of the images of a prepared folder, if you moved them.",
    ),
    click.option(
        "--test-fraction",
        type=Between(0, 0.9),
        help="Share of the images held out for test; 0: no test split, as in the notebooks."
        "  [0.15]",
    ),
    click.option(
        "--split-seed",
        type=click.IntRange(0, 2**31 - 1),
        help="Decides which images are for test and for validation; --seed is for training.  [0]",
    ),
    click.option(
        "--duplicates",
        type=Spelled(["near", "exact", "ignore"]),
        help="Copies of one image stay on one side of every split. near: images that look alike"
        " count as copies; exact: only byte-identical files; ignore: split copies freely, as in"
        " the notebooks.  [near]",
    ),
    click.option(
        "--test-file",
        metavar="FILE",
        help="CSV (filename,label) with labels for images in the data's folder test/; these become"
        " the test split.  [none]",
    ),
    click.option(
        "--label-spelling",
        type=Spelled(["stop", "merge", "keep"]),
        help="At labels that differ only by case, spaces or digits such as 1 and 1.0: stop and list"
        " them, merge them into the most frequent spelling, or keep them apart.  [stop]",
    ),
)
training_options = combine(
    click.option(
        "--variant",
        type=Spelled(list(VARIANTS)),
        default="v3",
        help="Recipe to train (`har variants` lists them). The options from --loader to --seed"
        " change it.",
    ),
    click.option(
        "--run-name",
        metavar="NAME",
        help="Name of the run in the MLflow UI.  [built from the variant, backbone, hardware, data"
        " and your changes]",
    ),
    data_options,
    recipe_options,
    experiment_option,
    runtime_option,
    cluster_options,
)


def find_named_data(data: str) -> "str | Source":
    """Find the folder that `--data` or $HAR_DATA names, before slow imports: it may be wrong.

    Other values stay: they draw the sample, or download.
    """
    if data in ("sample", "kaggle") or (data == "auto" and "HAR_DATA" not in os.environ):
        return data
    from har.data.sources import find_source

    return find_source(data)


def find_image_folder(data: str) -> Path:
    """Find the folder from which the paths of a data set's images start."""
    from har.data.manifest import read_manifest
    from har.data.sources import find_folder

    source = find_folder(data, why=f"--data {data}")
    return read_manifest(source.root).root if source.layout == "prepared" else source.root


def pop_cluster(options: dict[str, Any]) -> Cluster | None:
    """Take the options of the cluster out of `options`; None for this machine alone."""
    executor, address, workers = (options.pop(name) for name in CLUSTER_OPTIONS)
    if executor == "ray":
        check_ray()
        return Cluster(address=address, workers=workers)
    for name, value in (("ray-address", address), ("workers", workers)):
        if value is not None:
            raise UserError(f"--{name} is for --executor ray")
    return None


def pop_split(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the split out of `options`; return those that were given."""
    given = {name: options.pop(name) for name in SPLIT_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}
