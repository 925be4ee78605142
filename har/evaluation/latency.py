"""Latency of a served model for one image."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from har.data.images import read_image
from har.data.manifest import Manifest

# The first calls are slower: TensorFlow traces functions and allocates memory.
WARM_UP_CALLS = 5
TIMED_CALLS = 50
# Stop after this time with a slow model: B7 takes 0.1 s for an image.
TIMED_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds for one image, with decoding; the fields are logged as metrics."""

    latency_ms: float
    latency_p95_ms: float


def measure_latency(predict: Callable[[pd.DataFrame], Any], manifest: Manifest) -> Latency:
    """Measure the median and the 95th percentile of `predict` on one test image at a time.

    A server calls `predict` in the same way; HTTP is not included.
    """
    times = []
    enough = time.perf_counter() + TIMED_S
    for path in manifest.rows("test")["path"].head(WARM_UP_CALLS + TIMED_CALLS):
        data = read_image(manifest.root / path, inside=manifest.root)
        request = pd.DataFrame({"image": [data]})
        started = time.perf_counter()
        predict(request)
        times.append(1000 * (time.perf_counter() - started))
        if time.perf_counter() > enough and len(times) > 2 * WARM_UP_CALLS:
            break
    # with very few images, the first calls count too
    timed = times[min(WARM_UP_CALLS, len(times) - 1) :]
    median, p95 = np.percentile(timed, (50, 95))
    return Latency(latency_ms=float(median), latency_p95_ms=float(p95))
