"""Classifies images on a Ray cluster: Ray Data reads, decodes and computes in a pool of actors.

Each actor loads the model once. Where the cluster has GPUs, an actor has one, and tasks beside it
decode; without, an actor decodes too. Ray limits what is under way, runs work of a lost actor or
node again, and so may compute a row twice: whoever takes the rows keeps one of each.
"""

import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from har.data.images import ImageError, decode, read_image
from har.inference.classifier import (
    CLASSIFIER_FOLDER,
    Prediction,
    explain_failure,
    load_classifier,
    read_facts,
)
from har.inference.predict import BATCH, classify_files
from har.recipe import Recipe
from har.util.ray_cluster import count_gpus, count_nodes

# Images in a block, the unit that Ray schedules, and computes again when a node is lost.
BLOCK = 128
Batch = dict[str, Any]


def decode_batch(batch: Batch, resize: str, size: int) -> Batch:
    """Decode a batch of files, on a CPU beside a GPU.

    The columns number and path become number, pixels, (images, size, size, 3) uint8, and error.
    """
    pixels = np.zeros((len(batch["path"]), size, size, 3), np.uint8)
    errors: list[str] = []
    for place, path in enumerate(batch["path"]):
        try:
            pixels[place] = decode(read_image(Path(os.fsdecode(path))), resize, size)
            errors.append("")
        except ImageError as error:
            errors.append(str(error))
    return {"number": batch["number"], "pixels": pixels, "error": np.array(errors, object)}


class Scorer:
    """An actor that classifies files, or images that were decoded before.

    A batch has the columns number and path, or those of `decode_batch`. The answer has number,
    label, probability, error and where: the process and the node that computed it.
    """

    def __init__(self, packed: list[Any]) -> None:
        """`packed` holds a reference to a classifier's folder, by `pack_classifier`."""
        import ray

        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=BytesIO(ray.get(packed[0]))) as tar:
                tar.extractall(folder, filter="data")
            self.classifier = load_classifier(Path(folder) / CLASSIFIER_FOLDER)
        self.where = f"{os.getpid()}@{ray.get_runtime_context().get_node_id()[:8]}"

    def __call__(self, batch: Batch) -> Batch:
        """Classify a batch."""
        rows = self._compute(batch) if "pixels" in batch else self._classify(batch)
        # "" and 0 in the place of None, which would come back as a number
        found = {
            "label": np.array([row["label"] or "" for row in rows], object),
            "probability": np.array([row["probability"] or 0.0 for row in rows]),
            "error": np.array([row["error"] or "" for row in rows], object),
            "where": np.array([self.where] * len(rows), object),
        }
        return {"number": batch["number"], **found}

    def _classify(self, batch: Batch) -> list[Prediction]:
        paths = [Path(os.fsdecode(each)) for each in batch["path"]]
        return list(classify_files(paths, self.classifier.classify))

    def _compute(self, batch: Batch) -> list[Prediction]:
        whole = [place for place, error in enumerate(batch["error"]) if not error]
        rows = [explain_failure(error) for error in batch["error"]]
        if whole:
            answers = self.classifier.forward(batch["pixels"][whole])
            for place, answer in zip(whole, answers, strict=True):
                rows[place] = self.classifier.predict_from(answer)
        return rows


def pack_classifier(folder: Path) -> bytes:
    """Pack a classifier's folder for the workers."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, CLASSIFIER_FOLDER)
    return buffer.getvalue()


def score_on_ray(
    paths: Sequence[Path], numbers: Sequence[int], folder: Path, workers: int | None
) -> Iterator[tuple[int, Prediction, str]]:
    """Yield (number, prediction, worker) of `paths[number]` for these numbers, in any order, each
    at least once.

    `folder` is the classifier's. `workers` actors compute, by default one on each GPU, or two on
    each node. Call it while connected to a cluster.
    """
    import pyarrow
    import ray
    import ray.data

    _quiet_ray_data()
    # as bytes: a name may not be UTF-8
    names = [os.fsencode(paths[each]) for each in numbers]
    table = pyarrow.table({"number": list(numbers), "path": names})
    gpus, packed = count_gpus(), [ray.put(pack_classifier(folder))]
    workers = workers or gpus or 2 * count_nodes()
    # something to do for each of them
    blocks = max(-(-len(numbers) // BLOCK), min(workers, len(numbers)))
    dataset = ray.data.from_arrow(table, override_num_blocks=blocks)
    if gpus:
        recipe = Recipe(**read_facts(folder)["recipe"])
        size = {"resize": recipe.resize, "size": recipe.served_size}
        dataset = dataset.map_batches(decode_batch, batch_size=BATCH, fn_kwargs=size)
    scored = dataset.map_batches(
        Scorer,
        batch_size=BATCH,
        fn_constructor_args=(packed,),
        compute=ray.data.ActorPoolStrategy(size=workers),
        **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
    )
    columns = ("number", "label", "probability", "error", "where")
    for batch in scored.iter_batches(batch_size=None):
        for number, *values, where in zip(*(batch[name] for name in columns), strict=True):
            yield int(number), _build_row(*values), str(where)


def _build_row(label: Any, probability: Any, error: Any) -> Prediction:
    if error:
        return explain_failure(str(error))
    return {"label": str(label), "probability": float(probability), "top_3": [], "error": None}


def _quiet_ray_data() -> None:
    """Leave progress and messages to this project."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
