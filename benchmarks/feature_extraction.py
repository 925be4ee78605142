"""What computing features costs beside the forward pass alone, in time and in memory.

    python benchmarks/feature_extraction.py --data DIR

Everything runs in this one command, on images of DIR (a folder that `har run --data` takes),
with random weights, which cost what ImageNet's do:

- speed: for each backbone and runtime, extraction as `har run` does it (read, decode, resize,
  forward, write, checksum) and the bare runtime over the same images, decoded before, take turns;
  a ratio is the median of the ratios within a turn. The limit: where the forward pass takes every
  core, decoding can only take its time from it, and the ratio is at most the forward pass' share of
  the CPU seconds of both;
- growth: seconds and memory of EfficientNetB0's features of 1,000, 2,000 and 4,000 images, each in
  a fresh process. Compiling is left out: it is paid once.

Prints tables, writes JSON, and exits with 1 if one of the bars is missed.
"""

import itertools
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil

from har.data.manifest import Manifest
from har.recipe import VARIANTS, Recipe
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

RUNTIMES = ("tensorflow", "openvino")
# Images of a turn: some seconds of each backbone.
SPEED_IMAGES = {"efficientnetb0": 2000, "efficientnetb7": 256}
# The C library keeps some of what it was given back, up to a point that comes after some thousand.
WARM_UP_IMAGES = 2000
GROWTH_BACKBONE = "efficientnetb0"
GROWTH_IMAGES = (1000, 2000, 4000)

TO_BARE = 0.9
# Seconds an image of the most images to those of the fewest.
LINEAR = 1.15
# Of what the additional images weigh decoded, beyond their features.
MEMORY_KEPT = 0.05


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Images a second of extraction, and of the bare runtime right after it; CPU seconds of the
    latter, and of decoding alone.
    """

    extraction: float
    bare: float
    bare_cpu_s: float
    decoding_cpu_s: float

    @property
    def ratio(self) -> float:
        """Of the bare runtime's speed, what extraction reaches."""
        return self.extraction / self.bare

    @property
    def limit(self) -> float:
        """What it can reach where the forward pass alone takes every core."""
        return self.bare_cpu_s / (self.bare_cpu_s + self.decoding_cpu_s)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One extraction: its seconds, its features' 10^6 bytes, and by how much the process grew."""

    images: int
    seconds: float
    features_mb: float
    growth_mb: float


def build_extraction(manifest: Manifest, backbone: str, runtime: str) -> Any:
    """For v5's recipe on this backbone."""
    from har.models.backbones import build_backbone
    from har.training.features import Extraction

    recipe = recipe_for(backbone)
    return Extraction(build_backbone(recipe), manifest, recipe, runtime)


def recipe_for(backbone: str) -> Recipe:
    """v5's, as it falls back on a CPU."""
    return replace(VARIANTS["v5"], backbone=backbone, weights="random", precision="float32")


@contextmanager
def empty_cache() -> Iterator[None]:
    """A cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HAR_CACHE"] = folder
        yield


def measure_speed(manifest: Manifest, backbone: str, runtime: str, turns: int) -> list[Turn]:
    """Extraction and bare runtime take turns; a first turn, which compiles, is not counted."""
    from har.inference.extractors import choose_arithmetic

    rows = some_rows(manifest, SPEED_IMAGES[backbone])
    extraction = build_extraction(manifest, backbone, runtime)
    arithmetic = choose_arithmetic(runtime, recipe_for(backbone), exact=False)
    batch = extraction.extractor(arithmetic, rows).batch_size
    ready = [(start, images.copy()) for start, images in extraction.batches(rows, None, batch, 0)]
    found = []
    for turn in range(turns + 1):
        say(f"{backbone}, {runtime}: turn {turn} of {turns}")
        with empty_cache():
            extracted_s, _ = timed(lambda: extraction.features(rows))
        extractor = extraction.extractor(arithmetic, rows)
        bare_s, bare_cpu_s = timed(
            lambda extractor=extractor: extractor.run(ready, lambda start, found: None)
        )
        _, decoding_cpu_s = timed(lambda: deque(extraction.batches(rows, None, batch, 0), maxlen=0))
        found.append(
            Turn(
                extraction=len(rows) / extracted_s,
                bare=len(rows) / bare_s,
                bare_cpu_s=bare_cpu_s,
                decoding_cpu_s=decoding_cpu_s,
            )
        )
    return found[1:]


def timed(call: Any) -> tuple[float, float]:
    """Seconds of one call, and every core's CPU seconds in this process."""
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - cpu_started


def some_rows(manifest: Manifest, count: int) -> Any:
    """So many images, drawn at random."""
    drawn = manifest.table.sample(min(count, len(manifest.table)), random_state=0)
    return drawn.reset_index(drop=True)


def measure_growth(manifest: Manifest, runtime: str, images: int) -> Growth:
    """Extract once, with everything compiled and warm before."""
    extraction = build_extraction(manifest, GROWTH_BACKBONE, runtime)
    with empty_cache():
        extraction.features(some_rows(manifest, WARM_UP_IMAGES))
    with empty_cache(), watch_memory() as highest:
        started = time.perf_counter()
        features = extraction.features(some_rows(manifest, images))
        seconds = time.perf_counter() - started
    return Growth(
        images=len(features),
        seconds=seconds,
        features_mb=features.nbytes / 1e6,
        growth_mb=highest[0] / 1e6,
    )


@contextmanager
def watch_memory() -> Iterator[list[int]]:
    """The most bytes by which this process grew, looked at a hundred times a second."""
    process, found, ended = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not ended.wait(0.01):
            found[0] = max(found[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def build_bars(speeds: dict[str, list[Turn]], growths: list[Growth]) -> list[Bar]:
    """Every claim with what was measured."""
    bars = [
        Bar(
            claim=f"{name}: extraction / bare",
            measured=statistics.median(turn.ratio for turn in turns),
            bound=TO_BARE,
            at_least=True,
        )
        for name, turns in speeds.items()
    ]
    few, many = growths[0], growths[-1]
    additional_mb = (many.images - few.images) * VARIANTS["v5"].image_size ** 2 * 3 / 1e6
    beyond = [each.growth_mb - each.features_mb for each in (few, many)]
    return [
        *bars,
        Bar(
            claim="seconds an image, most images / fewest",
            measured=(many.seconds / many.images) / (few.seconds / few.images),
            bound=LINEAR,
            at_least=False,
        ),
        Bar(
            claim="memory, share of additional images kept",
            measured=(beyond[1] - beyond[0]) / additional_mb,
            bound=MEMORY_KEPT,
            at_least=False,
        ),
    ]


def speed_lines(speeds: dict[str, list[Turn]]) -> list[str]:
    """Medians; the ratio and its limit are those within a turn."""
    lines = ["", f"{'images/s':<30}{'extraction':>12}{'bare':>10}{'ratio':>8}{'limit':>8}"]
    for name, turns in speeds.items():
        ours, bare, ratio, limit = (
            statistics.median(getattr(turn, each) for turn in turns)
            for each in ("extraction", "bare", "ratio", "limit")
        )
        lines.append(f"{name:<30}{ours:>12.1f}{bare:>10.1f}{ratio:>8.2f}{limit:>8.2f}")
    return lines


def growth_lines(growths: list[Growth]) -> list[str]:
    """By number of images."""
    lines = [
        "",
        f"{GROWTH_BACKBONE:<20}{'images':>10}{'seconds':>10}{'features MB':>13}{'growth MB':>11}",
    ]
    for each in growths:
        lines.append(
            f"{'':<20}{each.images:>10,}{each.seconds:>10.1f}{each.features_mb:>13.1f}"
            f"{each.growth_mb:>11.1f}"
        )
    return lines


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, help="folder of images, as for `har run`")
@click.option("--out", type=Path, default=RESULTS / "feature_extraction.json", show_default=True)
@click.option(
    "--backbone",
    "names",
    multiple=True,
    type=click.Choice(list(SPEED_IMAGES)),
    help="of the speeds; both, unless named",
)
@click.option("--turns", type=click.IntRange(1), default=5, show_default=True)
def main(data: str, out: Path, names: tuple[str, ...], turns: int) -> None:
    """Measure, print, write, evaluate."""
    from har.inference.runtimes import choose_runtime

    manifest = load_images(data)
    machine = find_machine()
    click.echo(f"{machine['cpu']}, {machine['cores']} cores; TensorFlow {machine['tensorflow']}")
    speeds = {
        f"{name}, {runtime}": in_fresh_process(measure_speed, manifest, name, runtime, turns)
        for name in names or SPEED_IMAGES
        for runtime in RUNTIMES
    }
    runtime, growths = choose_runtime("auto", 0), []
    for images in GROWTH_IMAGES:
        say(f"growth: {images:,} images by {runtime}")
        growths.append(in_fresh_process(measure_growth, manifest, runtime, images))
    bars = build_bars(speeds, growths)
    lines = (speed_lines(speeds), growth_lines(growths), bar_lines(bars))
    click.echo("\n".join(itertools.chain(*lines)))
    found = {
        "machine": machine,
        "speeds": {name: [asdict(each) for each in rows] for name, rows in speeds.items()},
        "growth": [asdict(each) for each in growths],
    }
    finish(out, found, bars)


if __name__ == "__main__":
    main()
