"""The frozen backbone and its features, kept from one training to the next in a process.

Building a backbone takes as long as training a head on its features.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from har.models.backbones import build_backbone
from har.models.devices import precision_policy
from har.recipe import EPOCH_FIELDS, field_values
from har.training.features import FeatureSplits, extract_splits
from har.training.job import TrainingJob
from har.training.loaders import Splits
from har.training.ray_features import open_extraction
from har.util.files import digest_bytes

# The fields of a recipe that change nothing about features, given the images of both splits.
NOT_OF_FEATURES = {
    *EPOCH_FIELDS, "head", "head_start", "class_weight", "calibration", "validation_fraction",
    "suspects", "strategy", "diagnostics",
}  # fmt: skip


@dataclass(kw_only=True)
class FrozenFeatures:
    """Those of the last training; a training that needs others replaces them."""

    key: tuple[Any, ...] = ()
    backbone: keras.Model | None = None
    features: FeatureSplits | None = None
    # Python's random state behind the building of the backbone, from which a head starts
    random_state: Any = field(default=None, repr=False)

    def compute(self, job: TrainingJob, splits: Splits) -> tuple[keras.Model, FeatureSplits]:
        """Return the float32 backbone of a job and its features, and leave the random numbers as if
        both were new.
        """
        key = _build_key(job, splits)
        if self.features is None or self.backbone is None or key != self.key:
            self.features = None  # not two at once in memory
            with precision_policy("float32"):
                self.backbone = build_backbone(replace(job.used, precision="float32"))
            self.random_state = random.getstate()
            with open_extraction(job, self.backbone) as extraction:
                self.features = extract_splits(extraction, splits)
            self.key = key
        random.setstate(self.random_state)
        return self.backbone, self.features


def _build_key(job: TrainingJob, splits: Splits) -> tuple[Any, ...]:
    values = [value for each, value in field_values(job.used) if each.name not in NOT_OF_FEATURES]
    # as a digest: a million paths would be kept for nothing
    rows = [
        digest_bytes("\0".join(each["path"]).encode(errors="surrogateescape"))
        for each in (splits.train, splits.validation)
    ]
    manifest = job.manifest
    return (*values, *rows, manifest.dataset_digest, manifest.test_digest, job.feature_runtime)
