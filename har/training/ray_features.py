"""Features by the workers of a Ray cluster: each holds the network, and computes parts of shards.

The workers live as long as an extraction, which asks for many views. Whoever asked writes the
cache, so only that machine needs its folder. Part by part, the numbers are those of one machine.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd

from har import __version__
from har.data.manifest import Manifest
from har.recipe import Recipe
from har.training.feature_cache import Features
from har.training.features import READ_SIZE, Extraction, Keep, Request, View
from har.training.job import TrainingJob
from har.util.errors import UserError
from har.util.hardware import has_bfloat16
from har.util.progress import say, warn
from har.util.ray_cluster import (
    POLL_S,
    Cluster,
    WorkerLost,
    connect,
    count_gpus,
    count_nodes,
    take_result,
)

# Images that a worker computes at once: enough that asking costs nothing, few enough that workers
# end together.
PART_ROWS = 8 * READ_SIZE
# Workers that may be lost, each replaced, before an extraction gives up.
MAX_LOST = 10
# Seconds without any worker until the user is told.
PATIENCE_S = 60
Packed = tuple[bytes, Manifest, Recipe, str, str]
# What a worker has computed: the rows and the seconds.
Answer = tuple[Features, float]


@contextmanager
def open_extraction(job: TrainingJob, network: keras.Model, cut: str = "") -> Iterator[Extraction]:
    """Yield an extraction of a job's images by a network, here or on the job's cluster."""
    asked = network, job.manifest, job.used, job.feature_runtime, cut
    if job.cluster is None:
        yield Extraction(*asked)
        return
    with ExitStack() as opened:
        yield RayExtraction(*asked, cluster=job.cluster, opened=opened)


class FeatureWorker:
    """An actor that computes features as `Extraction` does."""

    def load(self, packed: Packed, expected: str) -> None:
        """Load the network, or raise a UserError. `expected` describes what must compute."""
        content, manifest, recipe, runtime, cut = packed
        network = _unpack_network(content)
        self.extraction = Extraction(network, manifest, recipe, runtime, cut)
        if (found := describe_arithmetic(self.extraction)) != expected:
            raise UserError(
                f"a machine of the cluster computes features by {found}, this one by {expected}:"
                " they would differ. Give all machines equal versions and hardware, or leave"
                " --executor out"
            )

    def compute(self, rows: pd.DataFrame, view: View, arithmetic: str, part: range) -> Answer:
        """Compute one part of the rows, or raise a UserError."""
        request = Request(rows=rows, view=view, arithmetic=arithmetic, parts=[part])
        parts: dict[int, Any] = {}
        ((_, seconds),) = self.extraction.compute(request, parts.__setitem__, lambda: None)
        found = np.concatenate([parts[start] for start in sorted(parts)])
        return found.astype(self.extraction.dtype, copy=False), seconds


def describe_arithmetic(extraction: Extraction) -> str:
    """Describe what features depend on beside the network: versions and the kind of hardware."""
    kind = f"{extraction.device}{' with bfloat16' if has_bfloat16() else ''}"
    name = extraction.runtime
    return f"{name} {version(name)} on a {kind} in har {__version__}"


def _pack_network(network: keras.Model) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.keras"
        network.save(path)
        return path.read_bytes()


def _unpack_network(content: bytes) -> Any:
    # makes the layers of transformers known to Keras
    import har.models.vision_transformer  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.keras"
        path.write_bytes(content)
        return keras.models.load_model(path, compile=False)


class RayExtraction(Extraction):
    """An extraction whose workers are actors on a Ray cluster, started when the first features are
    missing, and ended with `opened`.
    """

    def __init__(self, *asked: Any, cluster: Cluster, opened: ExitStack) -> None:
        """`asked` are the arguments of Extraction."""
        super().__init__(*asked)
        self.cluster, self.opened = cluster, opened
        self.idle: list[Any] = []
        # what is asked for: the worker, and the part, None while it loads
        self.working: dict[Any, tuple[Any, range | None]] = {}
        self.lost = 0
        self.packed: Any = None

    def prepare(self, request: Request) -> None:
        """Connect, and start the workers."""
        if self.packed is not None:
            return
        import ray

        self.opened.enter_context(connect(self.cluster.address))
        asked = (self.manifest, self.recipe, self.runtime, self.cut)
        self.packed = ray.put((_pack_network(self.network), *asked))
        count = self.cluster.workers
        count = count or (count_gpus() if self.device == "GPU" else count_nodes())
        say(f"starting {count} workers, which load {self.recipe.backbone}")
        for _ in range(count):
            self._start_worker()

    def _start_worker(self) -> None:
        import ray

        options = {"num_gpus": 1} if self.device == "GPU" else {"num_cpus": 1}
        remote = ray.remote(FeatureWorker).options(scheduling_strategy="SPREAD", **options)
        worker = remote.remote()
        loading = worker.load.remote(self.packed, describe_arithmetic(self))
        self.working[loading] = worker, None

    def compute(
        self, request: Request, keep: Keep, checkpoint: Callable[[], None]
    ) -> Iterator[tuple[range, float]]:
        """Compute as `Extraction.compute` does; a part's seconds are the sum of its workers'."""
        import ray

        rows = ray.put(request.rows)
        left = {part: len(part) for part in request.parts}
        spent = dict.fromkeys(request.parts, 0.0)
        pieces = [
            (part, part[start : start + PART_ROWS])
            for part in request.parts
            for start in range(0, len(part), PART_ROWS)
        ]
        part_of = {piece: part for part, piece in pieces}
        for piece, (found, seconds) in self._share_out(part_of, rows, request, checkpoint):
            keep(piece.start, found)
            part = part_of[piece]
            left[part] -= len(piece)
            spent[part] += seconds
            if not left[part]:
                yield part, spent[part]

    def _share_out(
        self, pieces: Iterable[range], rows: Any, request: Request, checkpoint: Callable[[], None]
    ) -> Iterator[tuple[range, tuple[Features, float]]]:
        """Have the workers compute the pieces, one each at a time; yield what they found. Ask for
        the pieces of lost workers again.
        """
        import ray

        to_do = deque(pieces)
        unfinished, waited = len(to_do), 0.0
        while unfinished:
            checkpoint()
            while to_do and self.idle:
                worker, piece = self.idle.pop(), to_do.popleft()
                asked = worker.compute.remote(rows, request.view, request.arithmetic, piece)
                self.working[asked] = worker, piece
            ready, _ = ray.wait(list(self.working), timeout=POLL_S)
            waited = 0.0 if ready else waited + POLL_S
            if waited == PATIENCE_S and all(part is None for _, part in self.working.values()):
                warn("no worker has started: is a CPU or GPU of the cluster free?")
            for each in ready:
                worker, done = self.working.pop(each)
                try:
                    answer = take_result(each)
                except WorkerLost as error:
                    self._replace_worker(error)
                    to_do.extend([done] if done is not None else [])
                    continue
                self.idle.append(worker)
                if done is not None:
                    unfinished -= 1
                    yield done, answer

    def _replace_worker(self, error: Exception) -> None:
        """Start another worker; give up after many, whose reason may be the same."""
        self.lost += 1
        if self.lost > MAX_LOST:
            raise UserError(f"{self.lost} workers were lost, the last one so: {error}") from error
        warn("a worker of the cluster was lost: another computes its images again")
        self._start_worker()
