"""One training: the recipe as asked for, and as it can run on this machine."""

from collections.abc import Collection
from dataclasses import dataclass

from har.data.manifest import Manifest
from har.inference.runtimes import AUTO, choose_runtime
from har.models.backbones import name_weights_by_content
from har.models.devices import (
    STRATEGIES,
    Hardware,
    check_gpus,
    describe_unused_gpu,
    find_hardware,
    fit_to_hardware,
    format_hardware,
)
from har.recipe import VARIANTS, Recipe, changes, describe_changes, digest_recipe
from har.util.errors import UserError
from har.util.files import shorten_home
from har.util.progress import warn
from har.util.ray_cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training: what the user asked for, and what really runs here.

    `overridden` names the recipe fields that the user set: no fallback replaces them. `runtime` is
    the value of --runtime; `feature_runtime` computes features, if the recipe trains on them, on
    the machines of `cluster`, or on this one. `recipe_digest` is that of `used`.
    """

    variant: str
    requested: Recipe
    used: Recipe
    overridden: tuple[str, ...]
    hardware: Hardware
    replicas: int
    recipe_digest: str
    manifest: Manifest
    runtime: str
    feature_runtime: str
    cluster: Cluster | None = None

    @property
    def serving_runtime(self) -> str:
        """The runtime that the logged model computes with."""
        return "tensorflow" if self.runtime == AUTO else self.runtime

    @property
    def hardware_tag(self) -> str:
        """The devices in use, such as `2xT4`."""
        return format_hardware(self.hardware, self.replicas)

    @property
    def overrides(self) -> str:
        """The user's values that are not the variant's, as `field=value, ...`, or `none`."""
        asked = changes(VARIANTS[self.variant], self.requested)
        set_by_user = [
            f"{name}={shorten_home(str(new))}"
            for name, (_, new) in asked.items()
            if name in self.overridden
        ]
        return ", ".join(set_by_user) or "none"

    @property
    def differs_from_variant(self) -> str:
        """The differences of `used` from the variant, fallbacks included, as `field=value, ...`, or
        `none`.
        """
        return describe_changes(VARIANTS[self.variant], self.used) or "none"


def check_cluster(cluster: Cluster | None, recipe: Recipe) -> None:
    """Raise a UserError if there is a cluster and nothing of a recipe's training to do on it."""
    uses_features = (
        recipe.loader == "features"
        or recipe.head_start == "linear_probe"
        or recipe.suspects == "leave_out"
    )
    if cluster is not None and not uses_features:
        raise UserError(
            f"--executor ray computes features, which --loader {recipe.loader} does not use: take"
            " v5 to v7, or leave --executor out"
        )


def fit_to_machine(
    requested: Recipe, overridden: Collection[str], *, quiet: bool = False
) -> tuple[Hardware, Recipe]:
    """Find the hardware and the recipe that really runs on it; warn about what it replaces, unless
    `quiet`. It starts nothing on a GPU.
    """
    hardware = find_hardware()
    check_gpus(hardware)
    used, warnings = fit_to_hardware(requested, overridden, hardware)
    for message in [] if quiet else describe_unused_gpu(hardware) + warnings:
        warn(message)
    return hardware, used


def build_job(
    variant: str,
    requested: Recipe,
    overridden: Collection[str],
    manifest: Manifest,
    runtime: str = AUTO,
    feature_runtime: str | None = None,
    quiet: bool = False,
    cluster: Cluster | None = None,
) -> TrainingJob:
    """Find the hardware, fit the recipe to it, and warn about settings that a fallback replaces,
    unless `quiet`.

    A `feature_runtime` is used whatever `runtime` says.
    """
    hardware, used = fit_to_machine(requested, overridden, quiet=quiet)
    return TrainingJob(
        variant=variant,
        requested=requested,
        used=used,
        overridden=tuple(sorted(overridden)),
        hardware=hardware,
        replicas=STRATEGIES[used.strategy]().num_replicas_in_sync,
        recipe_digest=digest_recipe(name_weights_by_content(used)),
        manifest=manifest,
        runtime=runtime,
        feature_runtime=choose_runtime(
            feature_runtime or runtime, 0 if hardware.is_cpu else hardware.num_gpus
        ),
        cluster=cluster,
    )
