"""How long each way takes to a trained classifier, from the notebook's loop to v5.

    python benchmarks/time_to_accuracy.py --data DIR

Everything runs in this one command, on images of DIR (a folder that `har run --data` takes):

- speed, with the notebooks' EfficientNetB7 (random weights, which cost what ImageNet's do): the
  original notebook's loop, written anew here as it stands there, for three epochs on 4,000 images;
  between them, so that a machine's faster and slower hours are shared, v5 as the whole job,
  `har run`, with an empty cache, on 12,600 images, by each runtime; our original and v3 for two
  epochs on fewer. Where DIR has fewer images they are repeated under other names. The loop's 40
  epochs on 12,600 images are extrapolated from the median epoch;
- the limit: the same backbone's forward pass over ready images, by each runtime, alone;
- accuracy, with EfficientNet-Lite0 and its ImageNet weights on DIR's own images: v3 and v5 to their
  ends, v5 with an empty cache.

Prints tables, writes JSON, and exits with 1 if one of the bars is missed.
"""

import csv
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from har.data.manifest import Manifest
from har.recipe import VARIANTS
from har.util.progress import say
from measuring import (
    RESULTS,
    Bar,
    bar_lines,
    find_machine,
    finish,
    in_fresh_process,
    load_images,
)

NOTEBOOK_EPOCHS = 40
RUNTIMES = ("tensorflow", "openvino")
# Of v5 against the loop, on a CPU that has bfloat16 and on one that has not.
TO_NOTEBOOK = {"tensorflow": (45.0, 30.0), "openvino": (75.0, 30.0)}
FORWARD_SHARE, FIXED_S = 1.25, 40.0
TO_V3 = 5.0
BARE_IMAGES, BARE_PASSES = 256, 3


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured: images of the loop, of our variants and of v5."""

    backbone: str
    loop_images: int
    variant_images: int
    job_images: int


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The notebook's loop, started several times: seconds to decode and of an epoch, each time."""

    images: int
    decode_s: list[float]
    epoch_s: list[float]

    def extrapolate(self, images: int, epochs: int) -> float:
        """Seconds of so many epochs on so many images, each epoch as long as the median one."""
        decode_s, epoch_s = statistics.median(self.decode_s), statistics.median(self.epoch_s)
        return images / self.images * (decode_s + epochs * epoch_s)


# --- the notebook's loop


def notebook_loop(folder: Path, images: int, backbone: str) -> tuple[float, float]:
    """The original notebook's cells, one after the other, in its own way of doing things: seconds
    to decode, and of an epoch.
    """
    import keras
    import numpy as np
    import pandas as pd
    from keras import layers
    from PIL import Image

    started = time.perf_counter()
    table = pd.read_csv(folder / "Training_set.csv")[:images]
    img_data, img_label = [], []
    for name, label in zip(table["filename"], table["label"], strict=True):
        image = Image.open(folder / "train" / name)
        img_data.append(np.asarray(image.resize((160, 160))))
        img_label.append(label)
    codes, names = pd.factorize(np.asarray(img_label))
    data, labels = np.asarray(img_data), keras.utils.to_categorical(codes)
    decode_s = time.perf_counter() - started

    network = notebook_backbone(backbone)
    for layer in network.layers:
        layer.trainable = False
    model = keras.Sequential()
    model.add(network)
    model.add(layers.Flatten())
    model.add(layers.Dense(512, activation="relu"))
    model.add(layers.Dense(len(names), activation="softmax"))
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    # the notebook's first epoch traces too; here that is left out, in its favour
    model.fit(data[:64], labels[:64], epochs=1, verbose=0)
    started = time.perf_counter()
    model.fit(data, labels, epochs=1, verbose=0)
    return decode_s, time.perf_counter() - started


def notebook_backbone(name: str) -> Any:
    """As the notebook builds it, but for the weights, which need a download."""
    import keras

    if name.startswith("efficientnetb"):
        build = getattr(
            keras.applications, f"EfficientNet{name.removeprefix('efficientnet').upper()}"
        )
        return build(include_top=False, input_shape=(160, 160, 3), pooling="avg", weights=None)
    from har.models.backbones import build_backbone

    return build_backbone(replace(VARIANTS["original"], backbone=name, weights="random"))


# --- our jobs, as a user starts them


def repeat_images(manifest: Manifest, count: int, folder: Path) -> Path:
    """`count` images in Kaggle's layout, the manifest's over and over, class by class in turn."""
    (folder / "train").mkdir(parents=True)
    rows = manifest.table.sample(frac=1, random_state=0)
    with (folder / "Training_set.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filename", "label"))
        pairs = itertools.cycle(zip(rows["path"], rows["label"], strict=True))
        for number, (path, label) in enumerate(itertools.islice(pairs, count)):
            name = f"Image_{number + 1}{Path(path).suffix}"
            shutil.copyfile(manifest.root / path, folder / "train" / name)
            writer.writerow((name, label))
    return folder


def har_run(variant: str, data: Path | str, scratch: Path, *options: str) -> dict[str, Any]:
    """`har run` with an empty cache and a store of its own; the run's metrics and tags."""
    import mlflow

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        store = f"sqlite:///{folder}/mlflow.db"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "HAR_CACHE": f"{folder}/cache"}
        environment.pop("MLFLOW_RUN_ID", None)
        command = [sys.executable, "-m", "har", "run", "--variant", variant, "--data", str(data)]
        say(f"har run --variant {variant} {' '.join(options)}")
        done = subprocess.run(
            [*command, *options],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"har run ended with status {done.returncode}")
        client = mlflow.MlflowClient(store)
        (run,) = client.search_runs([client.get_experiment_by_name("har").experiment_id])
        epochs = client.get_metric_history(run.info.run_id, "images_per_second")
        tags = {
            name: run.data.tags[name] for name in ("variant", "differs_from_variant", "hardware")
        }
        return {**run.data.metrics, **tags, "rates": [each.value for each in epochs]}


def bare_forward(runtime: str, backbone: str, files: list[str]) -> float:
    """Images a second of the runtime alone, as fast as it is for training images."""
    import numpy as np
    from PIL import Image

    from har.inference.extractors import EXTRACTORS, choose_arithmetic
    from har.inference.freezing import trace
    from har.models.backbones import build_backbone

    recipe = replace(VARIANTS["v5"], backbone=backbone, weights="random", precision="float32")
    arithmetic = choose_arithmetic(runtime, recipe, exact=False)
    network = build_backbone(recipe)
    extractor = EXTRACTORS[runtime](network, trace(network, "float32"), recipe).compile(arithmetic)
    size = recipe.image_size
    images = np.stack([np.asarray(Image.open(f).resize((size, size)), np.float32) for f in files])
    batch = extractor.batch_size
    batches = [(i, images[i : i + batch]) for i in range(0, len(images), batch)]
    seconds = []
    for _ in range(1 + BARE_PASSES):
        started = time.perf_counter()
        extractor.run(batches, lambda start, features: None)
        seconds.append(time.perf_counter() - started)
    # the first one allocates
    return len(images) / statistics.median(seconds[1:])


# --- the measurement


def measure_speed(manifest: Manifest, scale: Scale, scratch: Path) -> dict[str, Any]:
    """Every way with the notebooks' backbone."""
    job = repeat_images(manifest, scale.job_images, scratch / "job")
    few = repeat_images(manifest, scale.variant_images, scratch / "few")
    name = scale.backbone
    common = ("--backbone", name, "--weights", "random", "--duplicates", "ignore")
    files = [str(each) for each in itertools.islice((job / "train").iterdir(), BARE_IMAGES)]
    found: dict[str, Any] = {"v5": {}, "bare": {}}
    times: list[tuple[float, float]] = []

    def time_loop() -> None:
        say(f"notebook's loop: an epoch on {scale.loop_images:,} images")
        times.append(in_fresh_process(notebook_loop, job, scale.loop_images, name))

    time_loop()
    for runtime in RUNTIMES:
        say(f"the forward pass alone: {runtime}")
        found["bare"][runtime] = in_fresh_process(bare_forward, runtime, name, files)
        found["v5"][runtime] = har_run("v5", job, scratch, *common, "--runtime", runtime)
        time_loop()
    for variant in ("original", "v3"):
        found[variant] = har_run(variant, few, scratch, *common, "--epochs", "2")
    decode_s, epoch_s = (list(each) for each in zip(*times, strict=True))
    found["loop"] = Loop(images=scale.loop_images, decode_s=decode_s, epoch_s=epoch_s)
    return found


def measure_accuracy(data: str, scratch: Path) -> dict[str, Any]:
    """v3 and v5 to their ends, with the weights that are installed."""
    lite = ("--backbone", "efficientnet-lite0")
    # a word such as sample stays one; each job has a working folder of its own
    where = str(Path(data).resolve()) if Path(data).is_dir() else data
    return {name: har_run(name, where, scratch, *lite) for name in ("v3", "v5")}


def build_bars(speed: dict[str, Any], accuracy: dict[str, Any], scale: Scale) -> list[Bar]:
    """Every claim with what was measured."""
    from har.util.hardware import has_bfloat16

    loop_s = speed["loop"].extrapolate(scale.job_images, NOTEBOOK_EPOCHS)
    bars = []
    for runtime in RUNTIMES:
        wall_s = speed["v5"][runtime]["wall_time_s"]
        forward_s = scale.job_images / speed["bare"][runtime]
        bars += [
            Bar(
                claim=f"v5, {runtime}: wall time - {FORWARD_SHARE:g} x forward pass, s",
                measured=wall_s - FORWARD_SHARE * forward_s,
                bound=FIXED_S,
                at_least=False,
            ),
            Bar(
                claim=f"notebook's loop / v5, {runtime}, seconds",
                measured=loop_s / wall_s,
                bound=TO_NOTEBOOK[runtime][0 if has_bfloat16() else 1],
                at_least=True,
            ),
        ]
    v3, v5 = accuracy["v3"], accuracy["v5"]
    return [
        *bars,
        Bar(
            claim="Lite0: v5's test accuracy - v3's",
            measured=v5["accuracy"] - v3["accuracy"],
            bound=0.0,
            at_least=True,
        ),
        Bar(
            claim="Lite0: v3 / v5, seconds to that accuracy",
            measured=v3["wall_time_s"] / v5["wall_time_s"],
            bound=TO_V3,
            at_least=True,
        ),
    ]


def speed_lines(speed: dict[str, Any], scale: Scale) -> list[str]:
    """Minutes for the job of each way; what was extrapolated says so."""
    loop = speed["loop"]
    minutes = loop.extrapolate(scale.job_images, NOTEBOOK_EPOCHS) / 60
    rate = loop.images / statistics.median(loop.epoch_s)
    lines = [
        "",
        f"{scale.backbone}, {scale.job_images:,} images{'':<12}{'images/s':>10}{'minutes':>10}",
    ]
    lines.append(f"{'notebook loop, 40 epochs (extrapolated)':<42}{rate:>10.1f}{minutes:>10.1f}")
    for variant in ("original", "v3"):
        # the first epoch traces
        lines.append(
            f"{variant + ', an epoch as trained here':<42}{speed[variant]['rates'][-1]:>10.1f}"
        )
    for runtime in RUNTIMES:
        run = speed["v5"][runtime]
        lines.append(
            f"{'forward pass alone, ' + runtime:<42}{speed['bare'][runtime]:>10.1f}"
            f"{scale.job_images / speed['bare'][runtime] / 60:>10.1f}"
        )
        lines.append(
            f"{'v5, ' + runtime + ', whole job':<42}{'':>10}{run['wall_time_s'] / 60:>10.1f}"
        )
        for label, name in (("extraction", "extraction_time_s"), ("with training", "train_time_s")):
            lines.append(f"{'  of that, ' + label:<42}{'':>10}{run[name] / 60:>10.1f}")
    return lines


def accuracy_lines(accuracy: dict[str, Any]) -> list[str]:
    """Test accuracy and wall time."""
    lines = [
        "",
        f"{'Lite0, ImageNet weights':<24}{'test accuracy':>28}{'epochs':>8}{'seconds':>10}",
    ]
    for name, run in accuracy.items():
        ends = f"{run['accuracy_low']:.1%} to {run['accuracy_high']:.1%}"
        lines.append(
            f"{name:<24}{run['accuracy']:>9.1%} ({ends}){len(run['rates']):>8}"
            f"{run['wall_time_s']:>10.0f}"
        )
    return lines


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, help="folder of images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "time_to_accuracy.json", show_default=True)
@click.option("--backbone", default="efficientnetb7", show_default=True, help="of the speeds")
@click.option("--images", type=click.IntRange(100), default=12_600, show_default=True)
@click.option("--loop-images", type=click.IntRange(100), default=4_000, show_default=True)
@click.option("--variant-images", type=click.IntRange(100), default=1_000, show_default=True)
def main(
    data: str, out: Path, backbone: str, images: int, loop_images: int, variant_images: int
) -> None:
    """Measure, print, write, evaluate."""
    manifest = load_images(data)
    scale = Scale(
        backbone=backbone,
        loop_images=min(loop_images, images),
        variant_images=variant_images,
        job_images=images,
    )
    machine = find_machine()
    click.echo(f"{machine['cpu']}, {machine['cores']} cores; TensorFlow {machine['tensorflow']}")
    with tempfile.TemporaryDirectory() as scratch:
        speed = measure_speed(manifest, scale, Path(scratch))
        accuracy = measure_accuracy(data, Path(scratch))
    bars = build_bars(speed, accuracy, scale)
    lines = (speed_lines(speed, scale), accuracy_lines(accuracy), bar_lines(bars))
    click.echo("\n".join(itertools.chain(*lines)))
    found = {"machine": machine, "scale": asdict(scale), "speed": speed, "accuracy": accuracy}
    found["speed"] = speed | {"loop": asdict(speed["loop"])}
    finish(out, json.loads(json.dumps(found)), bars)


if __name__ == "__main__":
    main()
