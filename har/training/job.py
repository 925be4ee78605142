"""A training as asked for, and as it can run on this machine."""

from dataclasses import dataclass

from har.data.manifest import Manifest
from har.inference.runtimes import AUTO
from har.models.devices import Hardware, format_hardware
from har.recipe import VARIANTS, Recipe, changes, describe_changes


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One training as asked for and as it can run here: what a run is labelled with.

    `overridden` names the fields that the user insists on. `runtime` is what was asked for;
    `feature_runtime` computes features, if the recipe wants any.
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

    @property
    def serving_runtime(self) -> str:
        """What the logged model computes with."""
        return "tensorflow" if self.runtime == AUTO else self.runtime

    @property
    def hardware_tag(self) -> str:
        """Such as `2xT4`."""
        return format_hardware(self.hardware, self.replicas)

    @property
    def overrides(self) -> str:
        """What the user set to another value than the variant's, `field=value, ...`, or `none`."""
        asked = changes(VARIANTS[self.variant], self.requested)
        set_by_user = [
            f"{name}={new}" for name, (_, new) in asked.items() if name in self.overridden
        ]
        return ", ".join(set_by_user) or "none"

    @property
    def differs_from_variant(self) -> str:
        """What really ran other than in the variant, fallbacks included: `field=value, ...`, or
        `none`.
        """
        return describe_changes(VARIANTS[self.variant], self.used) or "none"
