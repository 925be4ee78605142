"""Show where the time of a training epoch goes, and what each way to shorten it is worth.

    python benchmarks/training_epoch.py --data DIR

A short `fit` of v3 with EfficientNet-Lite0, the same with one thing changed, and the forward pass
alone take turns in one process.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.recipe import VARIANTS
from measuring import Claim, Tables, Turns

# epochs: more than all turns need
V3 = replace(VARIANTS["v3"], backbone="efficientnet-lite0", strategy="one_device", epochs=1000)
EPOCHS = 2
MOST_IMAGES = 2000
AS_IT_IS, AUTOTUNED = "v3 as it is", "input tuned by TensorFlow"
# The recipe, and training steps in one execution.
FITS = {
    AS_IT_IS: (V3, 1),
    AUTOTUNED: (V3, 1),
    "decoded images kept in memory": (replace(V3, loader="memory"), 1),
    "10 steps in one execution": (V3, 10),
    "no augmentation": (replace(V3, augmentation="none"), 1),
}


def _measure_fits(manifest: Manifest, steps: int, turns: int) -> Turns:
    """Let short trainings and forward passes of as many images take turns."""
    import internals

    calls: dict[str, Callable[[], Any]] = {}
    for name, (recipe, at_once) in FITS.items():
        with internals.tuned_by_tensorflow() if name == AUTOTUNED else nullcontext():
            calls[name], images = internals.build_fit(manifest, recipe, steps, EPOCHS, at_once)
    batch = np.zeros((V3.batch_size, V3.image_size, V3.image_size, 3), np.uint8)
    batches = [batch] * (images // V3.batch_size)
    for name, forward in internals.build_graphs(V3, len(manifest.class_names)).items():
        calls[f"forward pass alone, {name}"] = lambda f=forward: [f(each) for each in batches]

    def rate(call: Callable[[], Any]) -> dict[str, float]:
        return {"images/s": images / measuring.timed(call)}

    timed = {name: functools.partial(rate, call) for name, call in calls.items()}
    return measuring.take_turns(timed, turns)


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure in a fresh process."""
    manifest = measuring.some_images(load_manifest(data), 120 if tiny else MOST_IMAGES)
    steps, turns = (1, 1) if tiny else (20, 4)
    found = measuring.in_fresh_process(_measure_fits, manifest, steps, turns)
    rows = [
        row | {"to v3": measuring.median_ratio(found, "images/s", row["name"], AS_IT_IS)}
        for row in measuring.summarise(found)
    ]
    return {"Lite0 at 160 px": rows}, []


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
