"""Promotion: the best model becomes the champion, the registered version that is served."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from io import BytesIO, StringIO
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from numpy.random import default_rng

from har.data import sample
from har.inference.classifier import Prediction
from har.serving.load import load_logged_model, serve_here
from har.serving.selection import (
    CHAMPION,
    MODEL,
    PREVIOUS,
    Champion,
    Decision,
    Rules,
    alias_uri,
    check_chance,
    decide,
    decide_without_test,
    is_of_drawings,
    select_candidate,
)
from har.tracking import query
from har.tracking.records import Record, read_record
from har.tracking.store import open_run
from har.util.errors import UserError, first_line
from har.util.escaping import for_markdown, for_terminal
from har.util.files import cache_folder, digest_bytes, expand_home
from har.util.locks import file_lock
from har.util.progress import quiet_loading, warn

# Shown for a number that a run lacks.
NAN = float("nan")


def promote(experiment: str | None, rules: Rules, dry_run: bool = False) -> str:
    """Promote the best run of `experiment` if it beats the champion; return the decision's text.

    Under `mlflow run` the run records the decision, and its experiment is the default. Raises a
    UserError also if the champion was not evaluated on the same images, or if the candidate's model
    does not work.
    """
    # before the run is opened: MLflow then forgets which run `mlflow run` opened
    name = "" if rules.run_id else query.choose_experiment_to_read(experiment)
    tags = {MLFLOW_RUN_NAME: "promote", "job": "promote"}
    with open_run(name, tags) if "MLFLOW_RUN_ID" in os.environ else nullcontext() as run:
        decision = _decide_and_promote(name, rules, dry_run)
        if run:
            candidate = decision.selected.record.run_id
            mlflow.set_tags({"decision": decision.outcome, "candidate": candidate})
            run.describe("  \n".join(map(for_markdown, decision.text.split("\n"))))
        if decision.outcome == "refused":
            raise UserError(decision.why)
    return decision.text


def _decide_and_promote(experiment: str, rules: Rules, dry_run: bool) -> Decision:
    with promotion_lock():
        champion = _load_champion()
        decision = _decide(_load_candidates(experiment, rules.run_id), champion, rules)
        if decision.outcome == "would promote":
            decision = refuse_broken_model(decision)
        if dry_run or decision.outcome != "would promote":
            return decision
        version = _register(decision)
        # other machines do not see the lock
        if _load_champion() != champion:
            raise UserError("another machine changed the champion meanwhile: promote again")
        client = mlflow.MlflowClient()
        if champion is not None:
            # first: a crash in between must not lose the previous champion
            client.set_registered_model_alias(MODEL, PREVIOUS, champion.version)
        client.set_registered_model_alias(MODEL, CHAMPION, version)
    return replace(decision, outcome="promoted", version=version)


def _decide(candidates: Sequence[Record], champion: Champion | None, rules: Rules) -> Decision:
    rival = None if rules.ignore_champion else champion
    # a model of drawings never stands in the way of one of photographs
    if rival and (others := [each for each in candidates if is_of_drawings(rival, each)]):
        rival, candidates = None, others
    selected = select_candidate(candidates, rules, rival.test_digest if rival else None)
    mine = query.load_predictions(selected.record.run_id)
    selected = check_chance(selected, max(2, mine["label"].nunique()))
    if rival is None or rival.run_id == selected.record.run_id:
        return decide_without_test(selected, champion)
    return decide(selected, rival, mine, _load_rivals(selected.record, rival, mine), rules.alpha)


def promotion_lock() -> AbstractContextManager[None]:
    """Let one process of this machine at a time promote in a registry."""
    registry = digest_bytes(mlflow.get_registry_uri().encode())[:16]
    path = cache_folder() / f"promotion-{registry}.lock"
    return file_lock(path, waiting="waiting for another promotion")


def _load_candidates(experiment: str, run_id: str | None) -> list[Record]:
    """Load the trainings of an experiment that can be promoted, or only the one that is named."""
    if run_id:
        runs = [query.find_training(run_id)]
        experiment_id = runs[0].info.experiment_id
    else:
        experiment_id = query.find_experiment(experiment)
        runs = query.find_runs("tags.job = 'train'", [experiment_id])
    if not runs:
        raise UserError(f"experiment {experiment} has no trainings: `har run` records one")
    models = query.find_models(experiment_id)
    unfit = {run.info.run_id: why for run in runs if (why := _why_unfit(run, models))}
    if len(unfit) == len(runs):
        if run_id:
            raise UserError(f"run {run_id} cannot be promoted: it is {unfit[run_id]}")
        reasons = ", ".join(f"{count} {why}" for why, count in Counter(unfit.values()).items())
        raise UserError(f"no training of experiment {experiment} can be promoted: {reasons}")
    return [
        replace(read_record(run), model_uri=models[run.info.run_id])
        for run in runs
        if run.info.run_id not in unfit
    ]


def _why_unfit(run: mlflow.entities.Run, models: Mapping[str, str]) -> str | None:
    if run.info.status != "FINISHED":
        return "not finished"
    if "accuracy" not in run.data.metrics:
        return "without a test accuracy"
    return None if run.info.run_id in models else "without a model"


def _load_champion() -> Champion | None:
    version = _find_version(CHAMPION)
    if version is None:
        return None
    tags = _read_version(version)[0]
    return Champion(
        version=str(version.version),
        run_id=version.run_id or None,
        test_digest=tags.get("test_digest"),
        dataset=tags.get("dataset"),
        uris=(
            f"models:/{MODEL}/{version.version}",
            str(version.source),
            f"runs:/{version.run_id}/model",
        ),
    )


def _find_version(alias: str) -> Any:
    """Find the version of an alias; None if there is no such alias or no such model."""
    try:
        return mlflow.MlflowClient().get_model_version_by_alias(MODEL, alias)
    except (MlflowException, OSError) as error:
        # these two codes mean: no such model, no such alias
        code = getattr(error, "error_code", None)
        if code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise UserError(
            f"the model registry {mlflow.get_registry_uri()} cannot be used: {first_line(error)}"
        ) from error


def _read_version(version: Any) -> tuple[dict[str, str], dict[str, float]]:
    """Read the tags and metrics of a version's run; only the version's tags if the run is gone."""
    runs = query.find_runs(f"attributes.run_id = '{version.run_id}'") if version.run_id else []
    if not runs:
        return version.tags, {}
    return {**version.tags, **runs[0].data.tags}, runs[0].data.metrics


def _load_rivals(candidate: Record, champion: Champion, mine: pd.DataFrame) -> pd.DataFrame:
    """Load the champion's predictions for the images of `mine`, the candidate's predictions."""
    for run_id in _find_evaluations(champion, candidate.test_digest):
        try:
            found = query.load_predictions(run_id)
        except UserError as error:
            warn(str(error))
            continue
        # the same images may lie under other paths
        if set(found["path"]) == set(mine["path"]):
            return found
    options = candidate.split.as_options if candidate.split else ""
    raise UserError(
        f"the champion, version {champion.version}, was not evaluated on the test images of run"
        f" {candidate.run_id} (test digest {candidate.test_digest}): evaluate it with `har evaluate"
        f" --model {champion.uris[0]} --data DIR {options}` on that run's data"
    )


def _find_evaluations(champion: Champion, test_digest: str) -> list[str]:
    """Find the runs that hold the champion's predictions: its own, and later evaluations."""
    own = [champion.run_id] if champion.run_id and champion.test_digest == test_digest else []
    evaluations = query.find_runs(f"tags.job = 'evaluate' and tags.test_digest = '{test_digest}'")
    return own + [
        run.info.run_id
        for run in evaluations
        if run.info.status == "FINISHED"
        and (
            run.data.tags.get("trained_by", "") == champion.run_id
            or expand_home(run.data.tags["evaluated_model"]) in champion.uris
        )
    ]


def refuse_broken_model(decision: Decision) -> Decision:
    """Return the decision, or a refusal if the candidate's model does not work."""
    candidate = decision.selected.record
    with quiet_loading():
        problem = _find_problem(str(candidate.model_uri))
    if problem is None:
        return decision
    why = (
        f"the model of run {candidate.run_id} fails a smoke prediction and is not promoted:"
        f" {problem}; `mlflow runs delete --run-id {candidate.run_id}` makes the next best one the"
        " candidate"
    )
    return replace(decision, outcome="refused", why=why)


def _find_problem(uri: str) -> str | None:
    """Try a model on a drawn picture and on junk; return what is wrong with its answers."""
    picture = BytesIO()
    sample.draw_action(next(iter(sample.ACTIONS)), default_rng(0)).save(picture, "JPEG")
    try:
        classifier = load_logged_model(uri).classifier
        answer = serve_here(classifier)
        answers = answer(pd.DataFrame({"image": [picture.getvalue(), b"junk"]}))
        return check_answers(answers, classifier.class_names)
    # a broken model may raise anything at all
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"


def check_answers(answers: Sequence[Prediction], class_names: Collection[str]) -> str | None:
    """Return what is wrong with the answers to a picture and to junk, or None."""
    picture, junk = answers
    if picture["error"] is not None:
        return f"a picture gets the error {picture['error']}"
    for each in (picture, *picture["top_3"]):
        if each["label"] not in class_names:
            return f"{each['label']!r} is none of its classes"
        probability = each["probability"]
        # NaN is in no range
        if probability is None or not 0 <= probability <= 1:
            return f"a probability is {probability}"
    if not junk["error"] or junk["label"] is not None:
        return "what is no image gets no error"
    return None


def _register(decision: Decision) -> str:
    """Register the candidate's model, unless an interrupted call did; return the version."""
    candidate, client = decision.selected.record, mlflow.MlflowClient()
    condition = f"name = '{MODEL}' and run_id = '{candidate.run_id}'"
    if versions := client.search_model_versions(condition):
        version = max(int(each.version) for each in versions)
    else:
        # MLflow reports each step on stderr
        with redirect_stderr(StringIO()):
            version = mlflow.register_model(candidate.model_uri, MODEL).version
    tags = {
        "run_id": candidate.run_id,
        "variant": candidate.variant,
        "hardware": candidate.hardware,
        "accuracy": candidate.accuracy,
        "test_digest": candidate.test_digest,
        "selection": decision.selected.selection,
        "p_value": "none" if decision.p_value is None else decision.p_value,
    }
    for name, value in tags.items():
        client.set_model_version_tag(MODEL, str(version), name, str(value))
    return str(version)


def describe_champion() -> str:
    """Describe the present champion in a few lines."""
    version, previous = _find_version(CHAMPION), _find_version(PREVIOUS)
    if version is None:
        raise UserError(
            f"there is no champion yet in {mlflow.get_registry_uri()}: `har promote` chooses one"
        )
    tags, metrics = _read_version(version)
    accuracy, latency = "unknown", "unknown"
    if "accuracy" in metrics:
        low, high = (f"{metrics.get(f'accuracy_{end}', NAN):.1%}" for end in ("low", "high"))
        digest = tags.get("test_digest", "unknown")
        accuracy = f"{metrics['accuracy']:.1%} ({low} to {high}), test digest {digest}"
    if "latency_ms" in metrics:
        slow = metrics.get("latency_p95_ms", NAN)
        latency = f"{metrics['latency_ms']:.1f} ms an image (95th percentile {slow:.1f} ms)"
    facts = {
        "champion": f"{alias_uri(CHAMPION)}, version {version.version}",
        "run": f"{version.run_id or 'unknown'}, {tags.get(MLFLOW_RUN_NAME, 'not in this store')}",
        "variant": tags.get("variant", "unknown"),
        "hardware": tags.get("hardware", "unknown"),
        "accuracy": accuracy,
        "latency": latency,
        "selected on": tags.get("selection", "unknown"),
        "before": f"{alias_uri(PREVIOUS)}, version {previous.version}" if previous else "none",
    }
    return "\n".join(for_terminal(f"{name:<12} {value}") for name, value in facts.items())
