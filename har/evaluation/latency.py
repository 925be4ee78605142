"""How long a served model takes for one image."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from har.data.manifest import Manifest

# The first calls trace and allocate.
WARM_UP_CALLS = 5
TIMED_CALLS = 50
# Enough of a slow model: B7 takes a tenth of a second.
TIMED_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long a logged model takes for one image, decoding included, in milliseconds; the
    field names are the logged metric names.
    """

    latency_ms: float
    latency_p95_ms: float


def measure_latency(predict: Callable[[pd.DataFrame], Any], manifest: Manifest) -> Latency:
    """Median and 95th percentile over test images, each in a call of its own, of a served model
    called as a server calls it, without HTTP.
    """
    times = []
    enough = time.perf_counter() + TIMED_S
    for path in manifest.rows("test")["path"].head(WARM_UP_CALLS + TIMED_CALLS):
        request = pd.DataFrame({"image": [(manifest.root / path).read_bytes()]})
        started = time.perf_counter()
        predict(request)
        times.append(1000 * (time.perf_counter() - started))
        if time.perf_counter() > enough and len(times) > 2 * WARM_UP_CALLS:
            break
    # of very few images the first calls count too
    timed = times[min(WARM_UP_CALLS, len(times) - 1) :]
    median, p95 = np.percentile(timed, (50, 95))
    return Latency(latency_ms=float(median), latency_p95_ms=float(p95))
