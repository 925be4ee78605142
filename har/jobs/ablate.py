"""An ablation in the store: a parent run, and under it one training for each recipe.

Every training runs in a process of its own, so that its wall time is what a user of that recipe
waits. Features that another training of the ablation has left are used again where the change
leaves them valid; the seconds that they took when they were computed are added to its wall time, as
if it had computed them. A training that is finished in the same experiment, with the same recipe,
data and hardware, is not run again: an interrupted ablation goes on where it was.
"""

import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, TypeVar

import mlflow
import psutil
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from har.compare.ablation import (
    Cost,
    Step,
    describe_table,
    find_effects,
    measure_cost,
    plan_ablation,
    summarise_effect,
    tabulate_effects,
)
from har.compare.figures import draw_waterfall
from har.data.manifest import Manifest
from har.jobs.train import run_training
from har.models.backbones import name_weights_by_content
from har.models.devices import STRATEGIES, find_hardware, fit_to_hardware, format_hardware
from har.recipe import VARIANTS, Recipe, changes, digest_recipe
from har.tracking.query import find_current_experiment, find_experiment, find_runs
from har.tracking.records import Record, load_details, read_record
from har.tracking.store import open_run, quiet_mlflow
from har.tracking.tags import ablation_tags, read_tags
from har.tracking.ui import describe_run_page
from har.training.job import build_job
from har.util.errors import UserError
from har.util.process import process_start
from har.util.progress import say
from har.util.signals import handle_sigterm_as_ctrl_c

Returned = TypeVar("Returned")


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What was asked for: two variants, with the `overrides` fields changed in both, and how many
    seeds from the recipe's own on.
    """

    from_variant: str
    to_variant: str
    overrides: dict[str, Any]
    num_seeds: int
    manifest: Manifest
    runtime: str
    experiment: str

    @property
    def base(self) -> Recipe:
        """Where it starts."""
        return replace(VARIANTS[self.from_variant], **self.overrides)

    @property
    def end(self) -> Recipe:
        """Where it ends."""
        return replace(VARIANTS[self.to_variant], **self.overrides)

    def variant_of(self, step: Step) -> str:
        """By which a step's training is named: the one that it is nearer to."""
        return self.to_variant if step.kind in ("leave", "end") else self.from_variant


ONE_SEED = (
    "Each time is that of one training, and times scatter from one to the next: --num-seeds 3"
    " trains each recipe three times and takes the median."
)


def run_ablation(asked: Ablation) -> str:
    """Run what is missing, record the table and the picture; what to print.

    Raises:
        UserError: the variants are the same, or the base or the end cannot be trained.
    """
    steps = plan_ablation(asked.base, asked.end)
    name = find_current_experiment() or asked.experiment
    asked = replace(asked, experiment=name)
    tags = ablation_tags(asked.from_variant, asked.to_variant, asked.manifest)
    with open_run(name, tags) as run:
        ends = {"from": asked.from_variant, "to": asked.to_variant, "num_seeds": asked.num_seeds}
        run.log_params(ends | asked.overrides)
        with tempfile.TemporaryDirectory() as cache:
            costs = _measure_steps(asked, steps, run.id, cache)
        effects = find_effects(steps, costs, changes(asked.base, asked.end))
        table, sentences = describe_table(effects), [summarise_effect(each) for each in effects]
        if asked.num_seeds == 1:
            sentences.append(ONE_SEED)
        run.log_table(tabulate_effects(effects), "ablation.csv")
        mlflow.log_text("\n".join([table, "", *sentences]), "ablation.txt")
        mlflow.log_figure(draw_waterfall(effects), "figures/waterfall.png")
        run.describe("  \n".join(sentences))
    return "\n".join([table, "", *sentences, "", f"see it: {describe_run_page(run.id)}"])


def _measure_steps(
    asked: Ablation, steps: Sequence[Step], parent: str, cache: str
) -> list[Cost | None]:
    """The cost of each step; None for a forbidden one. Equal recipes are one object.

    The trainings share the features in the folder `cache`.
    """
    recipes = [
        [replace(step.recipe, seed=step.recipe.seed + seed) for seed in range(asked.num_seeds)]
        if step.recipe
        else []
        for step in steps
    ]
    every = list(dict.fromkeys(recipe for group in recipes for recipe in group))
    hardware = _in_own_process(_find_hardware_tags, every, sorted(asked.overrides))
    digests = dict(zip(every, hardware, strict=True))
    records: dict[tuple[str, str], Record] = {}
    for step, group in zip(steps, recipes, strict=True):
        for recipe in group:
            key = digests[recipe]
            if key not in records:
                say(
                    f"recipe {len(records) + 1} of {len(set(digests.values()))}: {_name_step(step)}"
                )
                run_id = _find_finished(asked, key) or _in_own_process(
                    _train_child, asked, asked.variant_of(step), recipe, parent, cache
                )
                records[key] = load_details(read_record(mlflow.get_run(run_id)))
                if not (records[key].history and records[key].recipe):
                    raise UserError(f"the history of run {run_id} cannot be read: delete the run")
    costs: dict[tuple[tuple[str, str], ...], Cost] = {}
    found: list[Cost | None] = []
    for group in recipes:
        keys = tuple(digests[recipe] for recipe in group)
        if keys and keys not in costs:
            costs[keys] = measure_cost([records[key] for key in keys])
        found.append(costs[keys] if keys else None)
    return found


def _name_step(step: Step) -> str:
    """A step as progress tells it."""
    return f"{step.kind} {step.field}".strip()


def _find_hardware_tags(
    recipes: Sequence[Recipe], overridden: Collection[str]
) -> list[tuple[str, str]]:
    """Recipe digest and hardware tag of each recipe as it would run here."""
    hardware, found = find_hardware(), []
    for recipe in recipes:
        used, _ = fit_to_hardware(recipe, overridden, hardware)
        replicas = STRATEGIES[used.strategy]().num_replicas_in_sync
        found.append(
            (digest_recipe(name_weights_by_content(used)), format_hardware(hardware, replicas))
        )
    return found


def _find_finished(asked: Ablation, key: tuple[str, str]) -> str | None:
    """A training of this recipe on this data and hardware that is done under an ablation."""
    wanted = {
        "recipe_digest": key[0],
        "hardware": key[1],
        "dataset_digest": asked.manifest.dataset_digest,
        "test_digest": asked.manifest.test_digest,
        "job": "train",
    }
    condition = " and ".join(f"tags.{name} = '{value}'" for name, value in wanted.items())
    experiment_ids = [find_experiment(asked.experiment)]
    runs = find_runs(f"{condition} and attributes.status = 'FINISHED'", experiment_ids)
    usable = [run for run in runs if _is_comparable(run, asked.runtime)]
    return str(usable[0].info.run_id) if usable else None


def _is_comparable(run: Any, runtime: str) -> bool:
    """Whether it was trained as here: under an ablation, so that its wall time holds no
    preparation of data, by the same runtime, and what it found in a cache has its time.
    """
    tags, params = read_tags(run), run.data.params
    return (
        MLFLOW_PARENT_RUN_ID in tags
        and (tags.get("feature_cache") != "hit" or "saved_time_s" in run.data.metrics)
        and "train_images" in params
        and params.get("runtime") == runtime
    )


def _train_child(asked: Ablation, variant: str, recipe: Recipe, parent: str, cache: str) -> str:
    """Train one recipe here and now; its run id."""
    started = process_start()
    quiet_mlflow()
    os.environ["HAR_CACHE"] = cache
    job = build_job(variant, recipe, asked.overrides, asked.manifest, asked.runtime)
    return run_training(job, asked.experiment, started, parent=parent).run_id


def _in_own_process(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """What it returns in a Python process started for it, which writes into the same store."""
    os.environ["MLFLOW_TRACKING_URI"] = mlflow.get_tracking_uri()
    with ProcessPoolExecutor(
        max_workers=1, mp_context=get_context("spawn"), initializer=handle_sigterm_as_ctrl_c
    ) as pool:
        working = pool.submit(function, *arguments)
        try:
            return working.result()
        except BrokenProcessPool as error:
            raise UserError("a training was killed from outside; was memory short?") from error
        except KeyboardInterrupt:
            # it may be that only this process was told to stop
            for child in psutil.Process().children():
                child.terminate()
            raise
