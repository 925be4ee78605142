"""A run's description in the MLflow UI: a few lines of Markdown and its pictures."""

from typing import TYPE_CHECKING
from urllib.parse import urlencode

from har.data.manifest import Manifest
from har.data.report import REPORT_FILE
from har.tracking.tags import count_images
from har.util.errors import without_password
from har.util.escaping import for_markdown
from har.util.files import shorten_home

if TYPE_CHECKING:
    # they load TensorFlow, which the job `prepare` does without
    from har.evaluation.evaluate import Evaluation
    from har.tracking.records import Record
    from har.training.job import TrainingJob
    from har.training.train import Result


def describe_preparation(run_id: str, manifest: Manifest) -> str:
    """Describe prepared data."""
    facts, counts = manifest.summary, count_images(manifest)
    return _join_lines(
        f"**{for_markdown(manifest.name)}**: {counts['images']:,} images of"
        f" {counts['classes']} classes: {counts['train_images']:,} train,"
        f" {counts['test_images']:,} test, {counts['unused_images']:,} unused",
        f"{facts.duplicate_groups} groups of copies ({facts.near_duplicate_groups} near),"
        f" {facts.conflicting_groups} with conflicting labels; {counts['leaks']} copies of"
        " training images in test/",
        f"{counts['dropped']} dropped, {counts['strays']} files without a label",
        f"{_link_artifact(run_id, REPORT_FILE, 'report with the pictures of all groups')} ·"
        f" {_link_artifact(run_id, 'figures/samples.png', 'images of each class')}",
        _show_artifact(run_id, "figures/class_balance.png", "images of each class, by split"),
    )


def describe_training(
    run_id: str, job: "TrainingJob", result: "Result", evaluation: "Evaluation | None"
) -> str:
    """Describe a training: what ran, its result, and its pictures."""
    curves = _show_artifact(run_id, "figures/learning_curves.png", "loss and accuracy by epoch")
    lines = [
        f"**{job.variant}** on {for_markdown(job.hardware_tag)}, data"
        f" {for_markdown(job.manifest.name)}",
        f"differs from the variant: {for_markdown(job.differs_from_variant)}",
        f"output layer solved for on {result.train_images:,} images, C {result.probe.c:g}"
        if result.probe
        else f"{len(result.history)} epochs of {result.train_images:,} images,"
        f" {result.history[-1]['images_per_second']:.0f} images/s in the last",
    ]
    if (found := result.extracted) is not None:
        lines.append(
            f"features by {found.runtime} in {found.arithmetic}, {found.seconds:.0f} s"
            + (", some or all from the cache" if found.cache == "hit" else "")
        )
    if evaluation is None:
        return _join_lines(*lines, "no test split: no accuracy", curves)
    return _join_lines(*lines, _format_scores(evaluation), curves, _link_evaluation(run_id))


def describe_evaluation(run_id: str, uri: str, evaluation: "Evaluation") -> str:
    """Describe the evaluation of a logged model."""
    return _join_lines(
        f"{for_markdown(shorten_home(without_password(uri)))} on the test split",
        _format_scores(evaluation),
        _link_evaluation(run_id),
    )


def describe_comparison(run_id: str, runs: int) -> str:
    """Describe a comparison of runs."""
    return (
        f"{runs} trainings compared: {_link_artifact(run_id, REPORT_FILE, 'the report')}, also"
        " among the artifacts, with its tables as CSV and its figures"
    )


def describe_audit(run_id: str, manifest: Manifest, suspects: int, images: int) -> str:
    """Describe an audit of labels."""
    return _join_lines(
        f"**{for_markdown(manifest.name)}**: {suspects:,} of {images:,} labels are in doubt; test"
        " images are not looked at",
        f"{_link_artifact(run_id, REPORT_FILE, 'page with the pictures')} ·"
        f" {_link_artifact(run_id, 'suspects.csv', 'table of all')}",
    )


def describe_search(
    run_id: str, best: str, trials: int, command: str, winner: "Record | None"
) -> str:
    """Describe a search: its best trial, the command that trains it, and the training that it was
    evaluated with.
    """
    lines = [f"best of {trials:,} trials: {for_markdown(best)}", f"`{command}`"]
    if winner is not None and winner.accuracy is not None:
        lines.append(
            f"trained so and evaluated on the test split, once: accuracy **{winner.accuracy:.1%}**,"
            f" run {winner.run_id}"
        )
    pictures = {"importances": "what each field explains", "parallel_coordinates": "all trials"}
    shown = [_show_artifact(run_id, f"figures/{name}.png", text) for name, text in pictures.items()]
    return _join_lines(*lines, _link_artifact(run_id, "trials.csv", "table of all trials"), *shown)


def _format_scores(evaluation: "Evaluation") -> str:
    scores = evaluation.scores
    return (
        f"test accuracy **{scores['accuracy']:.1%}** ({scores['accuracy_low']:.1%} to"
        f" {scores['accuracy_high']:.1%}, 95 %), top-3 {scores['top_3_accuracy']:.1%},"
        f" {len(evaluation.label_ids):,} images"
    )


def _link_evaluation(run_id: str) -> str:
    others = {
        "class_recall": "recall of each class",
        "reliability": "reliability",
        "mistakes": "most confident mistakes",
    }
    links = [_link_artifact(run_id, f"figures/{name}.png", text) for name, text in others.items()]
    confusion = _show_artifact(run_id, "figures/confusion_matrix.png", "confusion matrix")
    return _join_lines(" · ".join(links), confusion)


def _join_lines(*lines: str) -> str:
    # two spaces make Markdown keep the line break
    return "  \n".join(lines)


def _link_artifact(run_id: str, artifact: str, text: str) -> str:
    # relative to the page, so it works on any server
    return f"[{text}](get-artifact?{urlencode({'path': artifact, 'run_uuid': run_id})})"


def _show_artifact(run_id: str, artifact: str, text: str) -> str:
    return f"!{_link_artifact(run_id, artifact, text)}"
