"""Prepared data of a million images: seconds and memory until training starts.

    python benchmarks/manifest.py [--data DIR]

The table is made up: labels, digests and groups of copies at random. Its files are one image of the
data under a million names (hard links), so that the checks of files and the first batch are real.
Each step runs in a fresh process. Its memory is the most that this process has used, all imports
included.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import measuring
from har.data.duplicates import DUPLICATES
from har.data.manifest import Manifest, write_manifest
from har.data.prepare import load_manifest
from har.data.splits import Split, assign_splits
from har.data.summary import DataSummary
from har.data.table_files import COLUMNS
from har.recipe import VARIANTS
from har.util.files import digest_bytes
from har.util.process import peak_memory_mb
from har.util.progress import say
from measuring import Claim, Tables

ROWS, CLASSES, FOLDERS = 1_000_000, 20, 1000
# Images in a hundred that are a copy of another one.
COPIES = 2
MAX_SECONDS, MAX_MB = 60, 2000
SPLIT = Split()
PREPARED = "prepared"
# Steps of `har prepare` that are not part of the claim.
ONCE = ("find copies", "write")


def _build_table(rows: int, size: int) -> pd.DataFrame:
    """Make up the table of so many images, whose files have `size` bytes, before its split."""
    rng = np.random.default_rng(0)
    contents, looks = rng.bytes(32 * rows).hex(), rng.bytes(32 * rows).hex()
    # a copy has the digests of another image
    of = np.where(rng.random(rows) < COPIES / 100, rng.integers(0, rows, rows), np.arange(rows))
    label_id = np.arange(rows) % CLASSES
    return pd.DataFrame(
        {
            "path": [f"folder {n % FOLDERS:03}/Image_{n}.jpg" for n in range(rows)],
            "label": [f"class {n:02}" for n in label_id],
            "label_id": label_id,
            "width": 160,
            "height": 120,
            "bytes": size,
            "plain_jpeg": True,
            "sha256": [contents[64 * n : 64 * n + 64] for n in of],
            "perceptual_hash": [looks[64 * n : 64 * n + 64] for n in of],
            "part": "train",
        }
    )


def _link_images(table: pd.DataFrame, image: bytes, root: Path) -> None:
    """Give the image the name of each row; a file can have some ten thousand names."""
    say(f"{len(table):,} links")
    for folder in {os.path.dirname(path) for path in table["path"]}:
        (root / folder).mkdir(parents=True)
    file = root / "image"
    for path in table["path"].tolist():
        with suppress(OSError):
            os.link(file, root / path)
            continue
        file = root / path
        file.write_bytes(image)


def _measure_preparation(rows: int, image: bytes, scratch: Path) -> list[dict[str, Any]]:
    """Return the rows of the steps of `har prepare` that follow the images' inspection."""
    table = _build_table(rows, len(image))
    found = []

    def step(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - started
        found.append({"name": name, "seconds": seconds, "peak MB": peak_memory_mb()})
        return result

    # what only one step needs comes last, or the other's memory would be counted too
    table["duplicate_group"] = DUPLICATES["exact"](table)
    table["split"] = step("split", lambda: assign_splits(table, SPLIT))
    counts = {name: table[name].value_counts().to_dict() for name in ("split", "label")}
    summary = DataSummary(
        split=SPLIT,
        images=rows,
        images_by_split=counts["split"],
        images_by_label=counts["label"],
        duplicate_groups=int((table["duplicate_group"].value_counts() > 1).sum()),
    )
    manifest = Manifest(
        name="made up", root=scratch / "images", table=table[list(COLUMNS)], summary=summary
    )
    step("write", lambda: write_manifest(manifest, scratch / PREPARED))
    step("find copies", lambda: DUPLICATES["near"](table))
    return found


def _measure_start(scratch: Path) -> list[dict[str, Any]]:
    """Return the rows of what a training does before its first step."""
    # TensorFlow loads, as it does before any training
    import internals

    started = time.perf_counter()
    manifest = load_manifest(str(scratch / PREPARED))
    loaded, load_mb = time.perf_counter(), peak_memory_mb()
    internals.take_first_batch(manifest, VARIANTS["v3"])
    streaming = time.perf_counter()
    return [
        {"name": "load and check", "seconds": loaded - started, "peak MB": load_mb},
        {"name": "first batch", "seconds": streaming - loaded, "peak MB": peak_memory_mb()},
    ]


def measure(data: str, scratch: Path, tiny: bool) -> tuple[Tables, list[Claim]]:
    """Measure each step once."""
    given = load_manifest(data)
    images = given.table[given.table["plain_jpeg"]]
    image = (given.root / images.loc[images["bytes"].idxmin(), "path"]).read_bytes()
    say(f"the image is {digest_bytes(image)[:12]}, {len(image):,} bytes")
    rows = ROWS // (1000 if tiny else 1)
    _link_images(_build_table(rows, len(image)), image, scratch / "images")
    steps = measuring.in_fresh_process(_measure_preparation, rows, image, scratch)
    steps += measuring.in_fresh_process(_measure_start, scratch)
    files = [each for each in (scratch / PREPARED).iterdir() if each.name.startswith("manifest.")]
    size = [{"name": each.name, "MB": each.stat().st_size / 1e6} for each in files]
    counted = [each for each in steps if each["name"] not in ONCE]
    return {f"{rows:,} images": steps, "table": size}, [
        Claim(
            "seconds to split, load and start",
            sum(each["seconds"] for each in counted),
            "<=",
            MAX_SECONDS,
        ),
        Claim("peak MB", max(each["peak MB"] for each in counted), "<=", MAX_MB),
    ]


if __name__ == "__main__":
    measuring.run(__file__, __doc__, measure)
