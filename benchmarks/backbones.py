"""Measure what each backbone costs, and what its frozen features are worth.

    python benchmarks/backbones.py --data DIR

The forward passes of all backbones take turns over 32 images that were decoded before. For the
backbones whose ImageNet weights are installed with the project, a logistic regression is trained on
the frozen features; its regularisation is chosen on a fifth of the training images.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.data.splits import hold_out
from har.evaluation.metrics import wilson_interval
from har.recipe import VARIANTS, Backbone, Recipe
from measuring import Claim, Tables

BATCH = 32
STRENGTHS = [10.0**n for n in range(-4, 1)]


def _is_installed(backbone: str) -> bool:
    return backbone.startswith("efficientnet-lite")


def _recipe_for(backbone: str) -> Recipe:
    # random weights where the real ones are a download
    weights = "imagenet" if _is_installed(backbone) else "random"
    return replace(VARIANTS["v3"], backbone=backbone, weights=weights)


def _measure_costs(manifest: Manifest, names: Sequence[str], turns: int) -> list[dict[str, Any]]:
    """Return the table's rows without accuracy."""
    import internals

    rows = manifest.rows("test")[:BATCH]
    images = internals.read_images(manifest, rows, _recipe_for(names[0]))
    networks = {name: internals.build_backbone(_recipe_for(name)) for name in names}
    forwards = {name: _build_forward(network) for name, network in networks.items()}
    found = measuring.take_turns(
        {name: lambda f=f: {"images/s at 160 px": len(images) / measuring.timed(lambda: f(images))}
         for name, f in forwards.items()},
        turns,
    )  # fmt: skip
    return [
        {"name": row["name"], "parameters": networks[row["name"]].count_params(), **row}
        for row in measuring.summarise(found)
    ]


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
    """Measure the costs of all backbones in one process, then each accuracy."""
    manifest = load_manifest(data)
    names = [name for name in get_args(Backbone) if not tiny or name == "efficientnet-lite0"]
    rows = measuring.in_fresh_process(_measure_costs, manifest, names, 1 if tiny else 5)
    for row in rows:
        row["test accuracy of its features"] = (
            measuring.in_fresh_process(_measure_accuracy, manifest, row["name"])
            if _is_installed(row["name"])
            else "not measured"
        )
    return {"backbone": rows}, []


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
