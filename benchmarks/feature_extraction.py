"""Compare the extraction of features with the forward pass alone; measure how it grows.

    python benchmarks/feature_extraction.py --data DIR

Extraction (read, decode, resize, forward pass, write) and the forward pass over images that were
decoded before take turns, with random weights, which cost what ImageNet's do. The limit: where the
forward pass uses all cores, decoding can only take its time from it, so the ratio is at most the
forward pass' share of the CPU seconds of both. Seconds and memory by number of images are each
measured in a fresh process, after a first extraction.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import measuring
from har.data.manifest import Manifest
from har.data.prepare import load_manifest
from har.recipe import VARIANTS, Recipe
from measuring import Claim, Tables

# Images of a turn: some seconds.
SPEED_IMAGES = {"efficientnetb0": 2000, "efficientnetb7": 256}
GROWTH_BACKBONE, GROWTH_IMAGES = "efficientnetb0", 4000
# The C library keeps some freed memory; after so many images it keeps no more.
WARM_UP_IMAGES = 2000


def _recipe_for(backbone: str) -> Recipe:
    # as v5 is on a CPU
    return replace(VARIANTS["v5"], backbone=backbone, weights="random", precision="float32")


def _measure_speed(manifest: Manifest, backbone: str, runtime: str, turns: int) -> dict[str, Any]:
    """Return a row of the table of speeds."""
    import internals

    recipe, rows = _recipe_for(backbone), manifest.table
    extract = internals.build_extraction(manifest, recipe, runtime)
    forward = internals.build_forward(recipe, runtime)

    def decode() -> Any:
        return internals.read_images(manifest, rows, recipe)

    images = decode().astype(np.float32)
    calls = {"extraction": lambda: extract(rows), "bare": lambda: forward(images)}
    found = measuring.take_turns(
        {name: lambda c=call: {"rate": len(rows) / measuring.timed(c)}
         for name, call in calls.items()},
        turns,
    )  # fmt: skip
    forward_cpu_s = _cpu_seconds(calls["bare"])
    return {
        "name": f"{backbone}, {runtime}",
        **{row["name"]: row["rate"] for row in measuring.summarise(found)},
        "ratio": measuring.median_ratio(found, "rate", "extraction", "bare"),
        "limit": forward_cpu_s / (forward_cpu_s + _cpu_seconds(decode)),
    }


def _cpu_seconds(call: Callable[[], Any]) -> float:
    # of all cores
    started = time.process_time()
    call()
    return time.process_time() - started


def _measure_growth(manifest: Manifest, images: int) -> dict[str, Any]:
    """Return a row of the table of growth."""
    import internals

    extract = internals.build_extraction(manifest, _recipe_for(GROWTH_BACKBONE), "openvino")
    extract(measuring.some_images(manifest, WARM_UP_IMAGES).table)
    rows, features = measuring.some_images(manifest, images).table, []
    seconds, growth_mb = measuring.watched(lambda: features.append(extract(rows)))
    return {
        "name": GROWTH_BACKBONE,
        "images": len(rows),
        "seconds": seconds,
        "features MB": features[0].nbytes / 1e6,
        "growth MB": growth_mb,
    }


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure each backbone and runtime, then the growth by OpenVINO."""
    manifest = load_manifest(data)
    divisor, turns = (20, 1) if tiny else (1, 5)
    speed, run = [], measuring.in_fresh_process
    for name in [GROWTH_BACKBONE] if tiny else SPEED_IMAGES:
        some = measuring.some_images(manifest, SPEED_IMAGES[name] // divisor)
        speed += [run(_measure_speed, some, name, each, turns) for each in measuring.RUNTIMES]
    most = min(GROWTH_IMAGES // divisor, len(manifest.table))
    growth = [run(_measure_growth, manifest, count) for count in (most // 4, most // 2, most)]
    few, many = growth[0], growth[-1]
    decoded_mb = (many["images"] - few["images"]) * VARIANTS["v5"].image_size ** 2 * 3 / 1e6
    beyond = [each["growth MB"] - each["features MB"] for each in (few, many)]
    slower = (many["seconds"] / many["images"]) / (few["seconds"] / few["images"])
    kept = (beyond[1] - beyond[0]) / decoded_mb
    return {"images/s": speed, "growth": growth}, [
        *(Claim(f"{row['name']}: extraction / bare", row["ratio"], ">=", 0.9) for row in speed),
        Claim("seconds an image, most images / fewest", slower, "<=", 1.15),
        Claim("share of additional images kept in memory", kept, "<=", 0.05),
    ]


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
