"""The job `predict`: many images into a file or a folder, on this machine or on a Ray cluster."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from har.inference.inputs import Input
from har.inference.predict import (
    AHEAD,
    WRITERS,
    Outcome,
    check_output,
    classify_files,
    lock_output,
    predict_to_file,
)
from har.inference.ray_scoring import score_on_ray
from har.inference.shards import FORMATS, Shards, open_shards
from har.serving.load import load_logged_model, open_classifier
from har.util.errors import UserError
from har.util.places import Place
from har.util.progress import progress, say
from har.util.ray_cluster import Cluster, connect


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Images to score, by the names that they get in `out`: a .csv or .parquet file, or a folder
    of files in the format `shards`. `files` says where the images of `data` are.
    """

    data: Place
    files: Mapping[str, Input]
    out: Place
    model: str
    cluster: Cluster | None = None
    shards: str = FORMATS[0]

    @property
    def into_file(self) -> bool:
        """Return whether `out` is one file."""
        return self.out.suffix in WRITERS


def run_prediction(asked: Scoring) -> Outcome:
    """Score the images that an interrupted call of the same kind left, and count them all."""
    if asked.cluster is not None:
        return _score_on_ray(asked, asked.cluster)
    logged = load_logged_model(asked.model)
    classify = logged.classifier.classify
    if asked.into_file and isinstance(asked.out, Path):
        return predict_to_file(asked.data, asked.files, asked.out, classify, logged.identity)
    with _open_output(asked, logged.identity) as shards:
        inputs = list(asked.files.values())
        numbers = shards.numbers
        with progress("scoring", len(inputs)) as advance:
            advance(len(inputs) - len(numbers))
            rows = classify_files([inputs[each] for each in numbers], classify, AHEAD)
            for number, row in zip(numbers, rows, strict=True):
                shards.add(number, row)
                advance(1)
        return shards.summarise()


def _score_on_ray(asked: Scoring, cluster: Cluster) -> Outcome:
    inputs, workers = list(asked.files.values()), set()
    with (
        open_classifier(asked.model) as (folder, identity),
        _open_output(asked, identity) as shards,
    ):
        if numbers := shards.numbers:
            with connect(cluster.address), progress("scoring", len(inputs)) as advance:
                advance(len(inputs) - len(numbers))
                for number, row, worker in score_on_ray(inputs, numbers, folder, cluster.workers):
                    workers.add(worker)
                    # a row that was computed twice counts once
                    advance(shards.add(number, row))
            nodes = {each.partition("@")[2] for each in workers}
            say(f"scored by {len(workers)} workers on {len(nodes)} nodes")
        return shards.summarise()


@contextmanager
def _open_output(asked: Scoring, model: str) -> Iterator[Shards]:
    """Yield the shards of a folder, or those that become a file when the block ends well."""
    out = asked.out
    folder = out.with_name(f".{out.name}.shards") if asked.into_file else out
    shard_format = FORMATS[0] if asked.into_file else asked.shards
    with _only_writer(out):
        if asked.into_file:
            check_output(out)
        shards = open_shards(folder, list(asked.files), model, shard_format)
        if there := shards.count - len(shards.missing):
            say(f"resuming: {there} of {shards.count} parts are there")
        yield shards
        if asked.into_file:
            shards.join(out)
            shards.delete()


@contextmanager
def _only_writer(out: Place) -> Iterator[None]:
    """Hold the lock of an output on this machine. Elsewhere there is none: what two commands write
    there is the same, and each file is whole.
    """
    if not isinstance(out, Path):
        yield
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    with lock_output(out, out.with_name(f".{out.name}.lock")):
        yield
