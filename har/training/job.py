"""A training as asked for, and as it can run on this machine."""

from dataclasses import dataclass

from har.data.manifest import Manifest
from har.inference.runtimes import AUTO
from har.models.devices import Hardware, format_hardware
from har.recipe import VARIANTS, Recipe, describe_changes


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training as asked for and as it can run here: what a run is labelled with.

    `typed` names the fields that the user insists on. `runtime` is what was asked for;
    `feature_runtime` computes features, if the recipe wants any.
    """

    variant: str
    requested: Recipe
    used: Recipe
    typed: tuple[str, ...]
    hardware: Hardware
    replicas: int
    recipe_digest: str
    manifest: Manifest
    runtime: str
    feature_runtime: str

    @property
    def serving_runtime(self) -> str:
        """What the logged model computes with."""
        return "tensorflow" if self.runtime == AUTO else self.runtime

    @property
    def hardware_tag(self) -> str:
        """Such as `2xT4`."""
        return format_hardware(self.hardware, self.replicas)

    @property
    def changed(self) -> str:
        """What really ran beside the variant's own fields, `field=value, ...`, or `none`."""
        return describe_changes(VARIANTS[self.variant], self.used) or "none"
