"""The tags and parameters by which runs are found and compared."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from har.data.manifest import Manifest
from har.recipe import Recipe, field_values
from har.util.errors import without_password
from har.util.files import shorten_home

if TYPE_CHECKING:
    # loads TensorFlow, which the job `prepare` does without
    from har.training.job import TrainingJob

RECIPE_ARTIFACT, HISTORY_ARTIFACT = "recipe.json", "history.json"
# Where a training's numbers come from: measured by this project, or published in a notebook.
SOURCE_TAG, MEASURED, NOTEBOOK = "source", "measured", "notebook"
# Of a run that was copied from another store: its id where it was recorded, and what it came in.
ORIGIN_TAG, FROM_TAG = "original_run_id", "imported_from"
# The recipe fields that are logged under their plain names, which the UI shows and filters by.
PLAIN_FIELDS = ("precision", "strategy", "backbone")
# Older names of tags, and older spellings of their values.
OLD_TAGS = {"changed": "differs_from_variant", "features": "feature_cache"}
OLD_VALUES = {"feature_cache": {"warm": "hit", "cold": "miss"}}


def read_tags(run: mlflow.entities.Run) -> dict[str, str]:
    """Return a run's tags under today's names, whichever version of this project recorded it."""
    found = dict(run.data.tags)
    for old, name in OLD_TAGS.items():
        if old in found and name not in found:
            value = found.pop(old)
            found[name] = OLD_VALUES.get(name, {}).get(value, value)
    return found


def training_params(job: "TrainingJob") -> dict[str, Any]:
    """Return what was requested (plain and `recipe.*`), what runs (`used.*`) and what was found."""
    used, hardware = job.used, job.hardware
    return {
        "variant": job.variant,
        **recipe_params(job.requested),
        **{f"used.{name}": getattr(used, name) for name in (*PLAIN_FIELDS, "batch_size")},
        "runtime": job.runtime,
        "used.serving_runtime": job.serving_runtime,
        "gpu_type": hardware.gpu_type,
        "num_gpus": hardware.num_gpus,
        "gpu_names": ", ".join(hardware.gpu_names) or "none",
        "num_replicas": job.replicas,
        "compute_capability": ", ".join(hardware.compute_capabilities) or "none",
        "nvidia_driver": hardware.driver,
        "cpu": hardware.cpu,
        "cpu_count": hardware.cpu_count,
        "memory_gb": hardware.memory_gb,
        **split_params(job.manifest),
        # without it: local, as in runs of older versions
        **({"executor": "ray"} if job.cluster else {}),
    }


def recipe_params(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's fields: PLAIN_FIELDS by their names, the others as `recipe.*`."""
    asked = recipe_fields(recipe)
    plain = {name: asked.pop(name) for name in PLAIN_FIELDS}
    return {**plain, **{f"recipe.{name}": value for name, value in asked.items()}}


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's fields by name; a path below the home folder begins with `~`."""
    fields = {each.name: value for each, value in field_values(recipe)}
    return {**fields, "weights": shorten_home(recipe.weights)}


def split_params(manifest: Manifest) -> dict[str, Any]:
    """Return the options of the split; a path below the home folder begins with `~`."""
    options = asdict(manifest.summary.split)
    return {**options, "test_file": shorten_home(options["test_file"])}


def _data_tags(manifest: Manifest) -> dict[str, str]:
    # runs are compared only within one test_digest
    return {
        "dataset": manifest.name,
        "dataset_digest": manifest.dataset_digest,
        "test_digest": manifest.test_digest,
    }


def job_tags(job: str, subject: str, manifest: Manifest | None = None) -> dict[str, str]:
    """Return the tags of a run that is no training; its name is the job and `subject`."""
    data = _data_tags(manifest) if manifest else {}
    return {MLFLOW_RUN_NAME: f"{job} · {subject}", "job": job, **data}


def count_images(manifest: Manifest) -> dict[str, int]:
    """Count images, classes, groups of copies, and what was left out."""
    facts, counts = manifest.summary, manifest.table["split"].value_counts()
    plain = ("images", "duplicate_groups", "near_duplicate_groups", "conflicting_groups")
    return {
        **{name: getattr(facts, name) for name in plain},
        "classes": len(manifest.class_names),
        **{f"{split}_images": int(counts.get(split, 0)) for split in ("train", "test", "unused")},
        **{name: len(getattr(facts, name)) for name in ("dropped", "strays", "leaks")},
    }


def training_tags(
    job: "TrainingJob", parent: str | None = None, run_name: str | None = None
) -> dict[str, str]:
    """Return the tags of a training; `parent` is a run's id, `run_name` the user's choice."""
    differing = [] if job.overrides == "none" else job.overrides.split(", ")
    words = [each for each in differing if not each.startswith("backbone=")]
    name = name_run(job.variant, job.used, job.hardware_tag, job.manifest.name, *words)
    return {
        **({MLFLOW_PARENT_RUN_ID: parent} if parent else {}),
        MLFLOW_RUN_NAME: run_name or name,
        SOURCE_TAG: MEASURED,
        "job": "train",
        "variant": job.variant,
        "overrides": job.overrides,
        "differs_from_variant": job.differs_from_variant,
        "hardware": job.hardware_tag,
        **({"hardware_pretended": "yes"} if job.hardware.pretended else {}),
        **_data_tags(job.manifest),
        "recipe_digest": job.recipe_digest,
    }


def name_run(variant: str, used: Recipe, hardware: str, *details: str) -> str:
    """Name a run by what tells it apart, such as `v3 · lite0 · 1xCPU · photos · epochs=5`.

    At most three details are named; longer ones are cut.
    """
    backbone = used.backbone.removeprefix("efficientnet").removeprefix("-")
    words = [word if len(word) <= 30 else f"{word[:29]}…" for word in details]
    more = [f"{len(words) - 3} more"] if len(words) > 3 else []
    return " · ".join([variant, backbone, hardware, *words[:3], *more])


def evaluation_tags(
    uri: str, trained_by: mlflow.entities.Run | None, manifest: Manifest
) -> dict[str, str]:
    """Return the tags of a run that evaluates a model; `trained_by` is None if its training run is
    not in this store.
    """
    shown = shorten_home(without_password(uri))
    name = trained_by.info.run_name if trained_by else shown
    tags = {**job_tags("evaluate", name, manifest), "evaluated_model": shown}
    if trained_by:
        there = read_tags(trained_by)
        tags["trained_by"] = trained_by.info.run_id
        tags |= {name: there[name] for name in ("variant", "differs_from_variant")}
    return tags
