"""The job `sweep`: a search for the best recipe, by trials that only validation images judge.

A parent run holds a nested run for each trial. Only the best recipe is then trained like any other,
and evaluated on the test split, once.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import mlflow
import pandas as pd

from har.jobs.children import (
    Child,
    build_key,
    call_on_cluster,
    find_finished,
    in_own_process,
    open_cluster,
    train_child,
)
from har.jobs.trials import (
    RUN_ID,
    Sweep,
    choose_overrides,
    list_values,
    open_search,
    run_missing_trials,
)
from har.models.backbones import name_weights_by_content
from har.recipe import build_recipe, digest_recipe
from har.search import pictures
from har.search.space import format_space
from har.search.study import ERROR, Progress, Search
from har.tracking.descriptions import describe_search
from har.tracking.query import find_current_experiment, find_experiment
from har.tracking.records import Record, read_record
from har.tracking.store import Run, explain_store_errors, open_run
from har.tracking.tags import job_tags
from har.tracking.trials import SEARCH_TAG, close_lost_trials, find_search_run
from har.training.job import build_job, fit_to_machine
from har.util.errors import UserError
from har.util.files import shorten_home
from har.util.process import spell_command
from har.util.progress import say


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a search found. `rows` are its trials, the best first. `winner` is the training of the
    best recipe, None if another process trains it.
    """

    rows: list[dict[str, Any]]
    progress: Progress
    command: str
    winner: Record | None
    run_id: str


def run_sweep(asked: Sweep) -> Swept:
    """Run the trials that are missing, record the search, and evaluate the best recipe.

    Raises:
        UserError: no validation images, a storage that cannot be used, or no trial that succeeded.
    """
    asked = replace(asked, experiment=find_current_experiment() or asked.experiment)
    _check_validated(asked)
    experiment_id = find_experiment(asked.experiment)
    name = _name_search(asked, experiment_id)
    search, parent = open_search(asked, name), None
    if find_current_experiment() is None:
        parent = find_search_run(name, experiment_id)
    subject = f"{asked.variant} · {', '.join(asked.space)}"
    tags = job_tags("sweep", subject, asked.manifest) | {SEARCH_TAG: name}
    stores = mlflow.get_tracking_uri(), asked.storage
    with (
        open_cluster(asked.cluster, *stores),
        open_run(asked.experiment, tags, parent) as run,
    ):
        run.log_params(_list_params(asked))
        say(
            f"search {name} in {asked.storage}: the same command resumes it; in a second terminal"
            " it takes part"
        )
        progress = run_missing_trials(asked, search, run.id)
        if progress.done < asked.trials:
            say(f"{progress.done} different recipes were found; further trials would repeat them")
        close_lost_trials(name, experiment_id)
        rows = tabulate_trials(search, asked.metric)
        _log_search(run, search, progress, rows)
        if progress.best is None:
            errors = [row["error"] for row in rows if row["error"]]
            raise UserError(f"none of {progress.done} trials succeeded: {errors[0]}")
        overrides = choose_overrides(asked, progress.best.params)
        command = spell_command("run", {"variant": asked.variant, **asked.given, **overrides})
        winner = _train_winner(asked, overrides, run.id) if search.is_last() else None
        best = f"{asked.metric} {progress.best.value:.4f} in trial {progress.best.number}"
        run.describe(describe_search(run.id, best, progress.done, command, winner))
    return Swept(rows=rows, progress=progress, command=command, winner=winner, run_id=run.id)


def _train_winner(asked: Sweep, overrides: dict[str, Any], parent: str) -> Record:
    """Train and evaluate the best recipe in a new process, where the trials ran."""
    say("training and evaluating the best recipe")
    child = _build_winner(asked, overrides, parent)
    if asked.cluster is None:
        run_id = in_own_process(_find_or_train, child)
    else:
        ((_, run_id),) = call_on_cluster(asked.cluster, _find_or_train, [(child,)])
    mlflow.set_tag("winner", run_id)
    with explain_store_errors():
        return read_record(mlflow.get_run(run_id))


def _check_validated(asked: Sweep) -> None:
    recipe = build_recipe(asked.variant, asked.overrides)
    if not recipe.validation_fraction:
        raise UserError(
            f"{asked.metric} is that of validation images, but {asked.variant} has none: add"
            " --validation-fraction 0.2"
        )


def _name_search(asked: Sweep, experiment_id: str) -> str:
    """Name a search by what its trials have in common; warn about what this machine cannot run."""
    with explain_store_errors():
        recorded = mlflow.get_experiment(experiment_id)
    _, used = fit_to_machine(build_recipe(asked.variant, asked.overrides), asked.overrides)
    common = {
        # fallbacks included: machines that train another recipe search apart
        "recipe": digest_recipe(name_weights_by_content(used)),
        "space": format_space(asked.space),
        "metric": asked.metric,
        "pruning": asked.pruning,
        "runtime": asked.runtime,
        "data": [asked.manifest.dataset_digest, asked.manifest.test_digest],
        # an experiment of another store, even of the same name, has none of the trials' runs
        "experiment": [experiment_id, recorded.creation_time],
    }
    return f"har-{hashlib.sha256(json.dumps(common).encode()).hexdigest()[:12]}"


def _list_params(asked: Sweep) -> dict[str, Any]:
    searched = {f"search.{name}": str(values) for name, values in asked.space.items()}
    overrides = {name: shorten_home(str(value)) for name, value in asked.overrides.items()}
    return {
        "variant": asked.variant,
        **overrides,
        **searched,
        "metric": asked.metric,
        "pruning": asked.pruning,
    }


def tabulate_trials(search: Search, metric: str) -> list[dict[str, Any]]:
    """Return a row for each trial that is over: the best first, the pruned and failed ones last."""
    return [
        {
            "trial": each.number,
            metric: each.value,
            "state": each.state.name.lower(),
            **{name: list_values(each).get(name) for name in search.space},
            "seconds": round(each.duration.total_seconds(), 1) if each.duration else None,
            "error": each.user_attrs.get(ERROR, ""),
            "run_id": each.user_attrs.get(RUN_ID, ""),
        }
        for each in search.ended
    ]


def _log_search(run: Run, search: Search, progress: Progress, rows: list[dict[str, Any]]) -> None:
    run.log_table(lambda: pd.DataFrame(rows), "trials.csv")
    counts = {"trials": progress.done, "pruned": progress.pruned, "failed": progress.failed}
    mlflow.log_metrics(counts, step=progress.done)
    if progress.complete > 1:
        study = search.study
        run.log_figure(
            lambda: pictures.draw_importances(study, search.metric), pictures.IMPORTANCES
        )
        run.log_figure(
            lambda: pictures.draw_parallel_coordinates(study, search.metric), pictures.PARALLEL
        )


def _build_winner(asked: Sweep, overrides: dict[str, Any], parent: str) -> Child:
    return Child(
        variant=asked.variant,
        recipe=build_recipe(asked.variant, overrides),
        overridden=tuple(overrides),
        manifest=asked.manifest,
        runtime=asked.runtime,
        experiment=asked.experiment,
        parent=parent,
    )


def _find_or_train(child: Child) -> str:
    """Return the id of an equal finished training, or train."""
    job = build_job(
        child.variant, child.recipe, child.overridden, child.manifest, child.runtime, quiet=True
    )
    found = find_finished(build_key(job), child.runtime, child.experiment, job="train")
    return str(found[0].info.run_id) if found else train_child(child)
