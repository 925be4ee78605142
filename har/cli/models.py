"""Commands about trained models: evaluate, classify, predict, promote, champion."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from har.cli.options import (
    Between,
    Spelled,
    cluster_options,
    combine,
    data_options,
    experiment_option,
    experiment_to_read_option,
    find_named_data,
    flag,
    model_option,
    offline_option,
    pop_cluster,
    pop_split,
)
from har.util.errors import UserError
from har.util.escaping import for_terminal
from har.util.garbage import collect_garbage_later
from har.util.places import Place, parse_place
from har.util.progress import say, show, warn

# A run id, as an argument and as the option that `mlflow run` can give.
run_id_option = combine(
    click.argument("run_id", required=False),
    click.option("--run-id", "run_id_option", help="The same as RUN_ID; for `mlflow run`."),
)


def _pick_run_id(argument: str | None, option: str | None) -> str | None:
    if argument and option:
        raise UserError(f"give the run once: received {argument} and --run-id {option}")
    return argument or option


@click.command()
@run_id_option
@click.option("--model", help="A model URI such as models:/har@champion, a run id, or a folder.")
@click.option(
    "--robustness-images",
    type=click.IntRange(0),
    default=1000,
    help="How many test images, at most, to evaluate again shifted, mirrored, blurred and with"
    " stronger JPEG compression; 0: none.",
)
@data_options
@experiment_option
def evaluate(
    run_id: str | None,
    run_id_option: str | None,
    model: str | None,
    data: str,
    image_root: Path | None,
    experiment: str,
    robustness_images: int,
    **options: Any,
) -> None:
    """Evaluate a trained model on the test split, and record that as a new run.

    RUN_ID is a finished training, its whole id or the beginning. Without --data, the model is
    evaluated on the test images of its training.
    """
    run_id = _pick_run_id(run_id, run_id_option)
    if (run_id is None) == (model is None):
        raise UserError("say which model: either RUN_ID or --model URI")

    found = find_named_data(data)
    from har.evaluation.evaluate import format_classes
    from har.evaluation.robustness import format_table
    from har.jobs.evaluate import evaluate_logged_model, load_test_data
    from har.serving.load import load_logged_model
    from har.tracking.store import open_experiment

    logged = load_logged_model(model or f"runs:/{run_id}/model")
    open_experiment(experiment)
    manifest = load_test_data(logged, found, pop_split(options), image_root)
    evaluation, robustness = evaluate_logged_model(logged, manifest, experiment, robustness_images)
    show(format_classes(evaluation.per_class))
    for name, value in evaluation.scores.items():
        show(f"{name:<18} {value:.4f}")
    if robustness is not None:
        show(format_table(robustness))


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@click.option("--url", help="Ask this running server instead, such as localhost:5001.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, with top_3.")
@offline_option
def classify(images: tuple[Path, ...], model: str, url: str | None, as_json: bool) -> None:
    """Tell what people do in IMAGES, which are files or folders of them."""
    from har.inference.inputs import find_images
    from har.inference.predict import classify_files, format_row

    paths = find_images(images)
    if url is None:
        from har.serving.load import load_logged_model

        answer: Any = load_logged_model(model).classifier.classify
    else:
        from har.serving.client import ask_server

        answer = partial(ask_server, url)
    errors = []
    for row in classify_files(paths, answer):
        show(json.dumps(row) if as_json else format_row(row))
        errors.append(row["error"])
    _check_any_label(errors.count(None), len(errors), next(filter(None, errors), ""))


def _check_any_label(labelled: int, images: int, first_error: str) -> None:
    """Exit with 1 if images were given and none of them has a label."""
    if images and not labelled:
        say(f"error: none of {images} images has a label; the first: {first_error}")
        click.get_current_context().exit(1)


class _PathOrUrl(click.Path):
    """A path, or a URL such as s3://bucket/folder."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        path = super().convert(value, param, context)
        return parse_place(path) if isinstance(path, str) else path


@click.command()
@click.option(
    "--data",
    type=_PathOrUrl(),
    required=True,
    metavar="DIR|URL|FILE",
    help="A folder of images, also by its URL (s3://BUCKET/FOLDER); Kaggle's layout, of which test/"
    " is classified; a list: .txt with a path or URL a line, .csv with a column filename or path;"
    " .parquet with the bytes in a column image, and names in filename; or one image.",
)
@click.option(
    "--out",
    type=_PathOrUrl(),
    default="predictions.csv",
    metavar="FILE|FOLDER|URL",
    help="A new .csv or .parquet file with the columns filename, label, probability, error; or a"
    " folder, for files of 1,024 rows. Also by its URL.",
)
@click.option(
    "--shards",
    type=Spelled(["parquet", "csv"]),
    help="The format of the files in a folder.  [parquet]",
)
@model_option
@cluster_options
@offline_option
def predict(data: Place, out: Place, shards: str | None, **options: Any) -> None:
    """Classify many unlabelled images into a file or a folder, here or at a URL.

    If it was interrupted, give the same command again: it continues where it stopped.
    """
    cluster = pop_cluster(options)
    with collect_garbage_later():
        from har.inference.inputs import find_inputs
        from har.inference.predict import check_output

        check_output(out)
        if shards and out.suffix:
            raise UserError(f"--shards is for a folder as --out; received {out}")
        files = find_inputs(data)
        from har.jobs.predict import Scoring, run_prediction

    options["shards"] = shards or "parquet"
    found = run_prediction(Scoring(data=data, files=files, out=out, cluster=cluster, **options))
    if found.failed:
        warn(f"{found.failed} images have no label; the column error says why")
    show(for_terminal(str(out)))
    _check_any_label(found.images - found.failed, found.images, found.first_error)


@click.command()
@run_id_option
@click.option(
    "--select-by",
    type=Spelled(["auto", "validation", "test"]),
    default="auto",
    help="Accuracy that selects the best run. auto: validation accuracy if any run has one, else"
    " test accuracy.",
)
@click.option(
    "--test-digest",
    help="Select among runs with this test_digest, that is, evaluated on these test images."
    "  [the champion's; without a champion the newest run's]",
)
@click.option(
    "--alpha",
    type=Between(0, 1, min_open=True),
    default=0.05,
    help="A run is better than the champion if the p-value of McNemar's exact test is below this.",
)
@flag(
    "--ignore-champion",
    "Replace the champion without a comparison; for when your test images or labels changed."
    " Selects among the newest run's test images.",
)
@flag("--dry-run", "Say what would be done, and test the model, but change nothing.")
@experiment_to_read_option
def promote(
    run_id: str | None,
    run_id_option: str | None,
    experiment: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Make the best run, or RUN_ID, the champion if it beats the present one on its test images.

    The champion is what models:/har@champion names; the one before is
    models:/har@previous-champion. A run that is not significantly better changes nothing, and
    that is no error.
    """
    from har.tracking.query import check_readable_store, find_run_id

    check_readable_store()
    from har.serving.promotion import promote
    from har.serving.selection import Rules

    named = _pick_run_id(run_id, run_id_option)
    rules = Rules(run_id=find_run_id(named) if named else None, **options)
    show(promote(experiment, rules, dry_run))


@click.command()
@offline_option
def champion() -> None:
    """Show the present champion: its run, variant, hardware, accuracy and latency."""
    from har.tracking.query import check_readable_store

    check_readable_store()
    from har.serving.promotion import describe_champion

    show(describe_champion())


COMMANDS = (evaluate, classify, predict, promote, champion)
