"""Prepare many drawn images; measure how time and memory grow.

    python benchmarks/preparation.py [--data DIR]

`har prepare` checks, groups and splits folders of drawn images of 32x32 pixels, each different, and
then a folder whose images are all copies of one, each with noise of its own. Memory is the most
that the command and its processes use together. With --data, that data set comes first.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

import measuring
from har.data.manifest import read_manifest
from har.util.progress import say
from measuring import Claim, Tables

COUNTS = (50_000, 100_000, 200_000)
ALIKE = 10_000
CLASSES = 20
MAX_MINUTES, MAX_ALIKE_MB = 10, 1000
# A machine's noise, and a search for near copies that takes a little more for each image.
MAX_GROWTH = 1.25
WATCH_EVERY_S = 0.1


def _draw_images(folder: Path, count: int, alike: bool) -> Path:
    """Draw images in class folders: soft blots of grey, or always the same ones, and noise."""
    say(f"drawing {count:,} images")
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class {label:02}").mkdir(parents=True)
    blots = rng.integers(0, 230, (9, 9)).astype(np.uint8)
    for number in range(count):
        if not alike:
            blots = rng.integers(0, 230, (9, 9)).astype(np.uint8)
        soft = Image.fromarray(blots).resize((32, 32), Image.Resampling.BICUBIC)
        noise = rng.integers(0, 20, (32, 32)).astype(np.uint8)
        path = folder / f"class {number % CLASSES:02}" / f"{number}.png"
        Image.fromarray(np.asarray(soft) // 2 + noise).save(path, compress_level=1)
    return folder


def _prepare(name: str, data: Path | str, folder: Path, *options: str) -> dict[str, Any]:
    """Return a row of the table."""
    out = folder / "prepared"
    command = [sys.executable, "-m", "har", "prepare", "--data", str(data), "--out", str(out)]
    command += options
    say(f"har {' '.join(command[3:])}")
    environment = {**os.environ, **measuring.store_in(folder)}
    started = time.monotonic()
    process = psutil.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, _used_bytes(process))
        time.sleep(WATCH_EVERY_S)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"har prepare ended with status {process.returncode}")
    table = read_manifest(out).table
    return {
        "name": name,
        "images": len(table),
        "groups": int(table["duplicate_group"].nunique()),
        "seconds": seconds,
        "images/s": len(table) / seconds,
        "peak MB": most / 1e6,
        "report MB": (out / "report.html").stat().st_size / 1e6,
    }


def _used_bytes(process: psutil.Process) -> int:
    used = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            used += each.memory_info().rss
    # a process that has just ended
    except psutil.NoSuchProcess:
        return 0
    return used


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure the given data, growing numbers of different images, and images that are alike."""
    divisor = 100 if tiny else 1
    rows = []
    if data != "sample":
        (scratch / "data").mkdir()
        rows.append(_prepare("--data", data, scratch / "data"))
    for count in [each // divisor for each in COUNTS]:
        images = _draw_images(scratch / str(count) / "images", count, alike=False)
        rows.append(_prepare(f"{count:,} different", images, images.parent))
        shutil.rmtree(images)
    images = _draw_images(scratch / "alike" / "images", ALIKE // divisor, alike=True)
    # nothing can be held out: all images are one group
    rows.append(_prepare("alike", images, images.parent, "--test-fraction", "0"))
    fewest, most, alike = rows[-4], rows[-2], rows[-1]
    slower = fewest["images/s"] / most["images/s"]
    return {"har prepare": rows}, [
        Claim(f"minutes for {most['images']:,} images", most["seconds"] / 60, "<=", MAX_MINUTES),
        Claim("seconds an image, most images / fewest", slower, "<=", MAX_GROWTH),
        Claim(f"peak MB of {alike['images']:,} alike", alike["peak MB"], "<=", MAX_ALIKE_MB),
    ]


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
