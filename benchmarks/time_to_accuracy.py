"""Measure how long each way takes to a trained classifier, from the notebook's loop to v5.

    python benchmarks/time_to_accuracy.py --data DIR

- speed, with EfficientNetB7 and random weights, which cost what ImageNet's do: three epochs of the
  original notebook's loop on 4,000 images; between them, so that all share the machine's faster and
  slower hours, v5 by each runtime as the whole job on 12,600 images, and its forward pass alone;
  original and v3 for two epochs on 600 images. Where DIR has fewer images they are repeated. The 40
  epochs of the loop, original and v3 are extrapolated;
- accuracy, with EfficientNet-Lite0 and its ImageNet weights on DIR's own images: v3 and v5 to their
  ends.

Every job is `har run` with an empty cache.
"""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.recipe import VARIANTS
from har.util.hardware import has_bfloat16
from har.util.progress import say
from measuring import Claim, Tables

EPOCHS = 40
FORWARD_IMAGES, FORWARD_PASSES = 256, 3
# How many times as long as v5 the loop takes at least: where the CPU has bfloat16, and elsewhere.
TO_NOTEBOOK = {"tensorflow": (45, 30), "openvino": (75, 30)}


def _notebook_loop(folder: Path, images: int, backbone: str) -> tuple[float, float]:
    """Run the original notebook's cells in its own way; return seconds of decoding, of an epoch.

    Only the weights differ, which need a download.
    """
    import keras
    import pandas as pd
    from keras import layers
    from PIL import Image

    table = pd.read_csv(folder / "Training_set.csv")[:images]
    img_data, img_label = [], []

    def decode() -> None:
        for name, label in zip(table["filename"], table["label"], strict=True):
            image = Image.open(folder / "train" / name)
            img_data.append(np.asarray(image.resize((160, 160))))
            img_label.append(label)

    decode_s = measuring.timed(decode)
    codes, names = pd.factorize(np.asarray(img_label))
    data, labels = np.asarray(img_data), keras.utils.to_categorical(codes)
    build = getattr(keras.applications, backbone.replace("efficientnetb", "EfficientNetB"))
    network = build(include_top=False, input_shape=(160, 160, 3), pooling="avg", weights=None)
    for layer in network.layers:
        layer.trainable = False
    model = keras.Sequential()
    model.add(network)
    model.add(layers.Flatten())
    model.add(layers.Dense(512, activation="relu"))
    model.add(layers.Dense(len(names), activation="softmax"))
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    # the notebook's first epoch compiles too; here that is left out, in its favour
    model.fit(data[:64], labels[:64], epochs=1, verbose=0)
    return decode_s, measuring.timed(lambda: model.fit(data, labels, epochs=1, verbose=0))


def _measure_forward(manifest: Manifest, backbone: str, runtime: str) -> float:
    """Return images a second of the forward pass alone, as for features of training images."""
    import internals

    recipe = replace(VARIANTS["v5"], backbone=backbone, weights="random", precision="float32")
    images = internals.read_images(manifest, manifest.table, recipe).astype(np.float32)
    forward = internals.build_forward(recipe, runtime)
    # the first pass allocates
    seconds = [measuring.timed(lambda: forward(images)) for _ in range(1 + FORWARD_PASSES)]
    return len(images) / statistics.median(seconds[1:])


def _run_all(
    manifest: Manifest, scratch: Path, backbone: str, counts: tuple[int, int, int]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Run every way; return the loop's epochs, v5's runs by runtime, and the other variants' runs.

    The counts are images of v5's job, of the loop, of the other variants.
    """
    job = measuring.repeat_images(manifest, counts[0], scratch / "job")
    few = measuring.repeat_images(manifest, counts[2], scratch / "few")
    options = ("--backbone", backbone, "--weights", "random", "--duplicates", "ignore")
    epochs: list[dict[str, Any]] = []

    def run_loop() -> None:
        name = f"epoch {len(epochs) + 1} of {EPOCHS}"
        say(f"the notebook's loop, {name}")
        arguments = (_notebook_loop, job, counts[1], backbone)
        decode_s, epoch_s = measuring.in_fresh_process(*arguments)
        epochs.append({"name": name, "decoding, s": decode_s, "epoch, s": epoch_s})

    run_loop()
    v5, some = {}, measuring.some_images(manifest, FORWARD_IMAGES)
    for runtime in measuring.RUNTIMES:
        rate = measuring.in_fresh_process(_measure_forward, some, backbone, runtime)
        run = measuring.har_run("v5", job, scratch / runtime, *options, "--runtime", runtime)
        v5[runtime] = run | {"forward_rate": rate, "forward_s": counts[0] / rate}
        run_loop()
    variants = {
        name: measuring.har_run(name, few, scratch / name, *options, "--epochs", "2")
        for name in ("original", "v3")
    }
    return epochs, v5, variants


def _measure_speed(
    manifest: Manifest, scratch: Path, backbone: str, counts: tuple[int, int, int]
) -> tuple[Tables, list[Claim]]:
    """Run every way, and compare v5 with its forward pass and with the loop."""
    epochs, v5, variants = _run_all(manifest, scratch, backbone, counts)
    images, loop_images, _ = counts
    # as if each epoch took as long as the median one
    decode_s = statistics.median(each["decoding, s"] for each in epochs)
    epoch_s = statistics.median(each["epoch, s"] for each in epochs)
    loop_s = images / loop_images * (decode_s + EPOCHS * epoch_s)
    seconds = {"notebook loop": (loop_images / epoch_s, loop_s)}
    for name, run in variants.items():
        # 15 % are test, and a share of the rest is validation; the first epoch, which compiles,
        # does not count
        trained = images * 0.85 * (1 - VARIANTS[name].validation_fraction)
        rate = run["images_per_second"]
        seconds[name] = (rate, EPOCHS * trained / rate)
    rows = [
        {"name": f"{name}, {EPOCHS} epochs (extrapolated)", "images/s": rate, "minutes": s / 60}
        for name, (rate, s) in seconds.items()
    ]
    claims = []
    for runtime, run in v5.items():
        wall_s, forward_s = run["wall_time_s"], run["forward_s"]
        rows += [
            {"name": f"forward pass alone, {runtime}", "images/s": run["forward_rate"],
             "minutes": forward_s / 60},
            {"name": f"v5, {runtime}, whole job", "minutes": wall_s / 60},
            {"name": "  of that, extraction", "minutes": run["extraction_time_s"] / 60},
            {"name": "  of that, with training", "minutes": run["train_time_s"] / 60},
        ]  # fmt: skip
        least = TO_NOTEBOOK[runtime][0 if has_bfloat16() else 1]
        claims += [
            Claim(f"v5, {runtime}: seconds - 1.25 x forward", wall_s - 1.25 * forward_s, "<=", 40),
            Claim(f"notebook loop / v5, {runtime}", loop_s / wall_s, ">=", least),
        ]
    tables = {f"{backbone}, {images:,} images": rows, f"loop on {loop_images:,} images": epochs}
    return tables, claims


def _measure_accuracy(
    data: str, scratch: Path, options: tuple[str, ...]
) -> tuple[Tables, list[Claim]]:
    """Train v3 and v5 to their ends."""
    options = ("--backbone", "efficientnet-lite0", *options)
    v3, v5 = (
        measuring.har_run(name, data, scratch / f"Lite0 {name}", *options) for name in ("v3", "v5")
    )
    rows = [
        {
            "name": name,
            "test accuracy": f"{run['accuracy']:.1%} "
            f"({run['accuracy_low']:.1%} to {run['accuracy_high']:.1%})",
            "epochs": run["epochs"],
            "seconds": run["wall_time_s"],
        }
        for name, run in (("v3", v3), ("v5", v5))
    ]
    return {"Lite0, ImageNet weights": rows}, [
        Claim("Lite0: v5's accuracy - v3's", v5["accuracy"] - v3["accuracy"], ">=", 0),
        Claim("Lite0: v3 / v5, seconds", v3["wall_time_s"] / v5["wall_time_s"], ">=", 5),
    ]


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure the speeds, then the accuracies."""
    backbone = "efficientnetb0" if tiny else "efficientnetb7"
    counts = (120, 64, 120) if tiny else (12_600, 4_000, 600)
    speed, claims = _measure_speed(load_manifest(data), scratch, backbone, counts)
    accuracy, more = _measure_accuracy(data, scratch, ("--epochs", "2") if tiny else ())
    return speed | accuracy, claims + more


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
