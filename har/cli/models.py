"""Commands about trained models: evaluate, classify, predict, promote, champion."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from har.cli.options import (
    Between,
    Spelled,
    data_options,
    experiment_option,
    flag,
    model_option,
    offline_option,
    typed_split,
)
from har.util.errors import UserError
from har.util.progress import quiet_loading, warn


@click.command()
@click.option("--run-id", help="A finished training run.")
@click.option("--model", help="A model URI such as models:/har@champion, or a folder.")
@click.option(
    "--robustness-images",
    type=click.IntRange(0),
    default=1000,
    show_default=True,
    help="At most so many test images are evaluated again shifted, mirrored, blurred and with"
    " stronger JPEG compression; 0: none.",
)
@data_options
@experiment_option
def evaluate(
    run_id: str | None,
    model: str | None,
    data: str,
    image_root: Path | None,
    experiment: str,
    robustness_images: int,
    **options: Any,
) -> None:
    """Evaluate a trained model on the test split, and record that as a run of its own."""
    if (run_id is None) == (model is None):
        raise UserError("say which model: either --run-id ID or --model URI")
    with quiet_loading():
        from har.data.prepare import load_manifest
        from har.evaluation.robustness import format_table
        from har.jobs.evaluate import evaluate_logged_model
        from har.serving.load import load_logged_model
        from har.tracking.store import open_experiment

    open_experiment(experiment)
    uri = model or f"runs:/{run_id}/model"
    logged = load_logged_model(uri)
    # the images that the model's own run held out, unless told otherwise
    manifest = load_manifest(data, typed_split(options), logged.split, image_root)
    evaluation, robustness = evaluate_logged_model(logged, manifest, experiment, robustness_images)
    click.echo(evaluation.per_class.to_string(index=False, float_format="{:.3f}".format))
    for name, value in evaluation.scores.items():
        click.echo(f"{name:<18} {value:.4f}")
    if robustness is not None:
        click.echo(format_table(robustness))


@click.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@model_option
@click.option("--url", help="Ask this running server instead, such as http://127.0.0.1:5001.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with top_3.")
@offline_option
def classify(images: tuple[Path, ...], model: str, url: str | None, as_json: bool) -> None:
    """Say what people do in IMAGES: files, or folders of them."""
    from har.inference.predict import classify_files, find_images, format_row

    paths = find_images(images)
    if url is None:
        with quiet_loading():
            from har.serving.load import load_logged_model
        answer: Any = load_logged_model(model).classifier.classify
    else:
        from har.serving.client import ask_server

        answer = partial(ask_server, url)
    for row in classify_files(paths, answer):
        click.echo(json.dumps(row) if as_json else format_row(row))


@click.command()
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
        from har.inference.predict import predict_to_file
        from har.serving.load import load_logged_model

    logged = load_logged_model(model)
    bad = predict_to_file(data, out, logged.classifier.classify, logged.identity)
    if bad:
        warn(f"{bad} images have no label; the column error says why")
    click.echo(out)


@click.command()
@click.option(
    "--experiment",
    help="MLflow experiment whose trainings are the candidates.  [har; under `mlflow run` the"
    " one that was given to mlflow]",
)
@click.option(
    "--select-by",
    type=Spelled(["auto", "validation", "test"]),
    default="auto",
    show_default=True,
    help="Accuracy that selects the candidate; auto: validation where a run has one, else test.",
)
@click.option(
    "--test-digest",
    help="Only runs evaluated on these test images.  [the champion's, else the newest run's]",
)
@click.option(
    "--alpha",
    type=Between(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="The candidate is better if McNemar's exact test gives a p-value below this.",
)
@flag(
    "--ignore-champion",
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
    from har.serving.promotion import promote
    from har.serving.selection import Rules
    from har.tracking.store import check_store

    check_store()
    click.echo(promote(experiment, Rules(**options), dry_run))


@click.command()
@offline_option
def champion() -> None:
    """Show the present champion: its run, variant, hardware, accuracy and latency."""
    from har.serving.promotion import describe_champion
    from har.tracking.store import check_store

    check_store()
    click.echo(describe_champion())


COMMANDS = (evaluate, classify, predict, promote, champion)
