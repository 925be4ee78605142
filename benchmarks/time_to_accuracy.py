"""Measure how long each way takes to a trained classifier, from the notebook's loop to v5.

    python benchmarks/time_to_accuracy.py --data DIR

- speed, with EfficientNetB7 and random weights, which cost what ImageNet's do: the original
  notebook's loop for three epochs on 4,000 images; between them, so that a machine's faster and
  slower hours are shared, v5 by each runtime as the whole job on 12,600 images, and its forward
  pass alone; original and v3 for two epochs on 600 images. Where DIR has fewer images they are
  repeated under other names. The loop's 40 epochs are extrapolated from the median epoch;
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

NOTEBOOK_EPOCHS = 40
FORWARD_IMAGES, FORWARD_PASSES = 256, 3
# How many times as long as v5 the loop takes at least: where the CPU has bfloat16, and elsewhere.
TO_NOTEBOOK = {"tensorflow": (45, 30), "openvino": (75, 30)}


def notebook_loop(folder: Path, images: int, backbone: str) -> tuple[float, float]:
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


def measure_forward(manifest: Manifest, backbone: str, runtime: str) -> float:
    """Return images a second of the forward pass alone, as for features of training images."""
    import internals

    recipe = replace(VARIANTS["v5"], backbone=backbone, weights="random", precision="float32")
    images = internals.read_images(manifest, manifest.table, recipe).astype(np.float32)
    forward = internals.build_forward(recipe, runtime)
    # the first pass allocates
    seconds = [measuring.timed(lambda: forward(images)) for _ in range(1 + FORWARD_PASSES)]
    return len(images) / statistics.median(seconds[1:])


def measure_speed(
    manifest: Manifest, scratch: Path, backbone: str, counts: tuple[int, int, int]
) -> tuple[Tables, list[Claim]]:
    """Run every way; the counts are images of v5's job, of the loop, of the other variants."""
    images, loop_images, variant_images = counts
    job = measuring.repeat_images(manifest, images, scratch / "job")
    few = measuring.repeat_images(manifest, variant_images, scratch / "few")
    options = ("--backbone", backbone, "--weights", "random", "--duplicates", "ignore")
    epochs: list[dict[str, Any]] = []

    def run_loop() -> None:
        name = f"epoch {len(epochs) + 1} of {NOTEBOOK_EPOCHS}"
        say(f"the notebook's loop, {name}")
        arguments = (notebook_loop, job, loop_images, backbone)
        decode_s, epoch_s = measuring.in_fresh_process(*arguments)
        epochs.append({"name": name, "decoding, s": decode_s, "epoch, s": epoch_s})

    run_loop()
    rows, jobs = [], {}
    some = measuring.some_images(manifest, FORWARD_IMAGES)
    for runtime in measuring.RUNTIMES:
        rate = measuring.in_fresh_process(measure_forward, some, backbone, runtime)
        run = measuring.har_run("v5", job, scratch / runtime, *options, "--runtime", runtime)
        jobs[runtime] = (run["wall_time_s"], images / rate)
        rows += [
            {"name": f"forward pass alone, {runtime}", "images/s": rate,
             "minutes": images / rate / 60},
            {"name": f"v5, {runtime}, whole job", "minutes": run["wall_time_s"] / 60},
            {"name": "  of that, extraction", "minutes": run["extraction_time_s"] / 60},
            {"name": "  of that, with training", "minutes": run["train_time_s"] / 60},
        ]  # fmt: skip
        run_loop()
    for name in ("original", "v3"):
        run = measuring.har_run(name, few, scratch / name, *options, "--epochs", "2")
        # of the last epoch: the first one compiles
        rate = run["images_per_second"]
        rows.append({"name": f"{name}, an epoch as trained here", "images/s": rate})
    decode_s, epoch_s = (
        statistics.median(each[key] for each in epochs) for key in ("decoding, s", "epoch, s")
    )
    # as if each epoch took as long as the median one
    loop_s = images / loop_images * (decode_s + NOTEBOOK_EPOCHS * epoch_s)
    name = f"notebook loop, {NOTEBOOK_EPOCHS} epochs (extrapolated)"
    rows.insert(0, {"name": name, "images/s": loop_images / epoch_s, "minutes": loop_s / 60})
    tables = {f"{backbone}, {images:,} images": rows, f"loop on {loop_images:,} images": epochs}
    return tables, compare(jobs, loop_s)


def compare(jobs: dict[str, tuple[float, float]], loop_s: float) -> list[Claim]:
    """Compare v5's seconds with those of the forward pass, which come second, and of the loop."""
    claims = []
    for runtime, (wall_s, forward_s) in jobs.items():
        least = TO_NOTEBOOK[runtime][0 if has_bfloat16() else 1]
        claims += [
            Claim(f"v5, {runtime}: seconds - 1.25 x forward", wall_s - 1.25 * forward_s, "<=", 40),
            Claim(f"notebook loop / v5, {runtime}", loop_s / wall_s, ">=", least),
        ]
    return claims


def measure_accuracy(
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
    speed, claims = measure_speed(load_manifest(data), scratch, backbone, counts)
    accuracy, more = measure_accuracy(data, scratch, ("--epochs", "2") if tiny else ())
    return speed | accuracy, claims + more


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
