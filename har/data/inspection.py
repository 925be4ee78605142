"""Check every image: what its file holds, or why it cannot be used."""

from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from har.data.hashes import perceptual_hash
from har.data.images import ImageError, is_plain_jpeg, open_image, read_image, to_rgb
from har.util.files import digest_bytes
from har.util.hardware import available_cpus
from har.util.progress import progress

# Files that one task of the thread pool inspects: single files would take a tenth more time.
FILES_PER_TASK = 16


def inspect_images(root: Path, paths: "pd.Series[str]") -> tuple[pd.DataFrame, dict[Any, str]]:
    """Return facts of each readable image, and reasons for the others, by the index of `paths`."""
    good: dict[Any, dict[str, Any]] = {}
    bad: dict[Any, str] = {}
    files = [root / path for path in paths]
    tasks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    # more threads than CPUs are slower: six threads on two CPUs take twice as long
    with (
        ThreadPoolExecutor(available_cpus()) as pool,
        progress("checking images", len(paths)) as advance,
    ):
        found = chain.from_iterable(pool.map(lambda task: [*map(_inspect_image, task)], tasks))
        for (index, path), facts in zip(paths.items(), found, strict=True):
            if isinstance(facts, str):
                bad[index] = facts
            else:
                good[index] = {"path": path, **facts}
            advance(1)
    columns = ["path", "width", "height", "bytes", "plain_jpeg", "sha256", "perceptual_hash"]
    return pd.DataFrame.from_dict(good, orient="index", columns=columns), bad


def _inspect_image(path: Path) -> dict[str, Any] | str:
    """Facts of one image file, or the reason why it cannot be used."""
    try:
        data = read_image(path)
        image = open_image(data)
        # before `to_rgb`, which turns the image upright and removes its EXIF tag
        facts = {"width": image.width, "height": image.height, "plain_jpeg": is_plain_jpeg(image)}
        image = to_rgb(image)
    except ImageError as error:
        return str(error)
    return {
        **facts,
        "bytes": len(data),
        "sha256": digest_bytes(data),
        "perceptual_hash": perceptual_hash(image),
    }
