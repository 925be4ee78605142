"""The job `ablate`: a parent run in the store, and under it one training for each recipe.

Each training runs in a new process, so that its wall time is what a user of that recipe waits. The
trainings of an ablation share cached features; after a cache hit, the time that the features took
to compute is added to the wall time. A finished training of the same recipe, data and hardware in
the experiment is reused, so an interrupted ablation continues where it stopped.
"""

import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from har.compare import ablation
from har.compare.costs import Cost, measure_cost
from har.compare.figures import draw_waterfall
from har.data.manifest import Manifest
from har.jobs.children import (
    Child,
    Key,
    build_key,
    call_on_cluster,
    find_finished,
    in_own_process,
    open_cluster,
    train_child,
)
from har.recipe import Recipe, build_recipe
from har.tracking.query import find_current_experiment
from har.tracking.records import Record, load_details, read_record
from har.tracking.store import open_run
from har.tracking.tags import job_tags, read_tags
from har.tracking.ui import describe_run_page
from har.training.job import build_job
from har.util.errors import UserError
from har.util.escaping import for_markdown, for_terminal
from har.util.files import shorten_home
from har.util.progress import say
from har.util.ray_cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An ablation between two variants. `overrides` are recipe fields to change in both; fields of
    one of the `groups` change together; `chain_only` leaves out what changes alone or last. Each
    recipe is trained with `num_seeds` seeds, from its own seed on.
    """

    from_variant: str
    to_variant: str
    overrides: dict[str, Any]
    groups: tuple[tuple[str, ...], ...]
    chain_only: bool
    num_seeds: int
    manifest: Manifest
    runtime: str
    experiment: str
    cluster: Cluster | None = None


ONE_SEED = (
    "Each time is that of one training, and times scatter from one to the next: --num-seeds 3"
    " trains each recipe three times and takes the median."
)


def run_ablation(asked: Ablation) -> str:
    """Train what is missing, record the table and the picture; return the text to print."""
    base = build_recipe(asked.from_variant, asked.overrides)
    end = build_recipe(asked.to_variant, asked.overrides)
    steps = ablation.plan_ablation(base, end, asked.groups, asked.chain_only)
    asked = replace(asked, experiment=find_current_experiment() or asked.experiment)
    tags = job_tags("ablate", f"{asked.from_variant} to {asked.to_variant}", asked.manifest)
    with (
        open_cluster(asked.cluster, mlflow.get_tracking_uri()),
        open_run(asked.experiment, tags) as run,
    ):
        ends = {"from": asked.from_variant, "to": asked.to_variant, "num_seeds": asked.num_seeds}
        overrides = {name: shorten_home(str(value)) for name, value in asked.overrides.items()}
        run.log_params(ends | overrides)
        costs = _measure_steps(asked, steps, run.id)
        effects = ablation.find_effects(steps, costs)
        table = ablation.describe_table(effects)
        sentences = [for_terminal(ablation.summarise_effect(each)) for each in effects]
        if asked.num_seeds == 1:
            sentences.append(ONE_SEED)
        run.log_table(lambda: ablation.tabulate_effects(effects), "ablation.csv")
        mlflow.log_text("\n".join([table, "", *sentences]), "ablation.txt")
        run.log_figure(lambda: draw_waterfall(effects), "figures/waterfall.png")
        run.describe("  \n".join(map(for_markdown, sentences)))
    page = map(for_terminal, describe_run_page(run.id))
    return "\n".join([table, "", *sentences, "", *page])


def _measure_steps(
    asked: Ablation, steps: Sequence[ablation.Step], parent: str
) -> list[Cost | None]:
    """Measure the cost of each step, None for a forbidden one; equal recipes share a Cost."""
    recipes = [
        [replace(step.recipe, seed=step.recipe.seed + seed) for seed in range(asked.num_seeds)]
        if step.recipe
        else []
        for step in steps
    ]
    every = list(dict.fromkeys(recipe for group in recipes for recipe in group))
    key_of = dict(zip(every, _find_keys(asked, every), strict=True))
    children: dict[Key, Child] = {}
    names: dict[Key, str] = {}
    for step, group in zip(steps, recipes, strict=True):
        variant = asked.to_variant if step.kind in ("leave", "end") else asked.from_variant
        for recipe in group:
            names.setdefault(key_of[recipe], f"{step.kind} {step.change}".strip())
            children.setdefault(key_of[recipe], _build_child(asked, variant, recipe, parent))
    say(f"{len(children)} recipes, one training each; interrupted, the same command resumes")
    train = _train_here if asked.cluster is None else _train_on_cluster
    records: dict[Key, Record] = {}
    for key, run_id in train(asked, children, names):
        records[key] = load_details(read_record(mlflow.get_run(run_id)))
        if not (records[key].history and records[key].recipe):
            raise UserError(f"the history of run {run_id} cannot be read: delete the run")
    groups = [tuple(key_of[recipe] for recipe in group) for group in recipes]
    costs = {each: measure_cost([records[key] for key in each]) for each in set(groups) if each}
    return [costs.get(each) for each in groups]


def _find_keys(asked: Ablation, recipes: Sequence[Recipe]) -> list[Key]:
    arguments = recipes, sorted(asked.overrides), asked.manifest
    if asked.cluster is None:
        return in_own_process(_build_keys, *arguments)
    # where the trainings run, the hardware may be another
    ((_, keys),) = call_on_cluster(asked.cluster, _build_keys, [arguments])
    return list(keys)


def _train_here(
    asked: Ablation, children: dict[Key, Child], names: dict[Key, str]
) -> Iterator[tuple[Key, str]]:
    """Yield the run of each training; one after the other, or their times would not compare. They
    share features.
    """
    with tempfile.TemporaryDirectory() as cache:
        for number, (key, child) in enumerate(children.items(), start=1):
            say(f"recipe {number} of {len(children)}: {names[key]}")
            yield key, _find_measured(asked, key) or in_own_process(train_child, child, cache)


def _train_on_cluster(
    asked: Ablation, children: dict[Key, Child], names: dict[Key, str]
) -> Iterator[tuple[Key, str]]:
    """Yield the run of each training; those that are missing run at once, one on each device, and
    find features in the cache of their machine.
    """
    assert asked.cluster is not None
    found = {key: _find_measured(asked, key) for key in children}
    yield from ((key, run_id) for key, run_id in found.items() if run_id)
    missing = [key for key, run_id in found.items() if not run_id]
    done = len(children) - len(missing)
    calls = [(children[key],) for key in missing]
    for number, run_id in call_on_cluster(asked.cluster, train_child, calls):
        done += 1
        say(f"{done} of {len(children)} recipes are trained: {names[missing[number]]}")
        yield missing[number], run_id


def _build_child(asked: Ablation, variant: str, recipe: Recipe, parent: str) -> Child:
    return Child(
        variant=variant,
        recipe=recipe,
        overridden=tuple(asked.overrides),
        manifest=asked.manifest,
        runtime=asked.runtime,
        experiment=asked.experiment,
        parent=parent,
    )


def _build_keys(
    recipes: Sequence[Recipe], overridden: Collection[str], manifest: Manifest
) -> list[Key]:
    """Build the key of each recipe as it would run here."""
    jobs = (build_job("original", each, overridden, manifest, quiet=True) for each in recipes)
    return [build_key(job) for job in jobs]


def _find_measured(asked: Ablation, key: Key) -> str | None:
    """Find the id of a finished training of an ablation whose times are known."""
    for run in find_finished(key, asked.runtime, asked.experiment, job="train"):
        # outside an ablation, the wall time includes the preparation of the data
        in_ablation = MLFLOW_PARENT_RUN_ID in run.data.tags
        # older versions did not record how long cached features took, nor `train_images`
        timed = read_tags(run).get("feature_cache") != "hit" or "saved_time_s" in run.data.metrics
        if in_ablation and timed and "train_images" in run.data.params:
            return str(run.info.run_id)
    return None
