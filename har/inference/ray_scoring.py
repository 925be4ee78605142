"""Classifies images on a Ray cluster: Ray Data reads, decodes and computes in a pool of actors.

Each actor loads the model once. Where the cluster has GPUs, an actor has one, and tasks beside it
decode; without, an actor decodes too. Both read the images themselves, also from a store or a
table. Ray limits what is under way, runs work of a lost actor or node again, and so may compute a
row twice: whoever takes the rows keeps one of each.
"""

import logging
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from har.data.images import ImageError, decode
from har.inference.classifier import (
    CLASSIFIER_FOLDER,
    Prediction,
    explain_failure,
    load_classifier,
    read_facts,
)
from har.inference.image_rows import Row
from har.inference.inputs import Input, pack_inputs, read_inputs, unpack_inputs
from har.inference.predict import BATCH, batched, classify_files
from har.recipe import Recipe
from har.util.ray_cluster import count_gpus, count_nodes

# Images in a block, the unit that Ray schedules, and computes again when a node is lost.
BLOCK = 128
# Rows that a worker hands on together; the images are not among them.
ROW_BYTES = 16_000
Batch = dict[str, Any]


def decode_batch(batch: Batch, resize: str, size: int) -> Batch:
    """Read and decode a batch of images, on a CPU beside a GPU.

    The columns number and those of `pack_inputs` become number, pixels, (images, size, size, 3)
    uint8, and error.
    """
    contents = read_inputs(unpack_inputs(batch))
    pixels = np.zeros((len(contents), size, size, 3), np.uint8)
    errors: list[str] = []
    for place, data in enumerate(contents):
        try:
            if isinstance(data, str):
                raise ImageError(data)
            pixels[place] = decode(data, resize, size)
            errors.append("")
        except ImageError as error:
            errors.append(str(error))
    return {"number": batch["number"], "pixels": pixels, "error": np.array(errors, object)}


class Scorer:
    """An actor that classifies images, read by itself or decoded before.

    A batch has the columns number and those of `pack_inputs`, or those of `decode_batch`. The
    answer has number, label, probability, error and where: the process and the node that computed
    it.
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
        return list(classify_files(unpack_inputs(batch), self.classifier.classify))

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
    inputs: Sequence[Input], numbers: Sequence[int], folder: Path, workers: int | None
) -> Iterator[tuple[int, Prediction, str]]:
    """Yield (number, prediction, worker) of `inputs[number]` for these numbers, in any order, each
    at least once.

    `folder` is the classifier's. `workers` actors compute, by default one on each GPU, or two on
    each node. Call it while connected to a cluster.
    """
    import ray
    import ray.data

    _set_up_ray_data()
    gpus, packed = count_gpus(), [ray.put(pack_classifier(folder))]
    workers = workers or gpus or 2 * count_nodes()
    dataset = ray.data.from_arrow(
        [_pack_block(inputs, each) for each in cut_blocks(inputs, numbers, workers)]
    )
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


def cut_blocks(inputs: Sequence[Input], numbers: Sequence[int], workers: int) -> list[list[int]]:
    """Cut numbers of images into blocks, with something to do for each worker.

    Rows of a table stay together as far as that allows, for to find a row, a worker reads its group
    from the beginning.
    """
    share = -(-len(numbers) // workers)
    blocks: list[list[int]] = []
    for group, members in groupby(numbers, key=lambda each: _group(inputs[each])):
        blocks += batched(members, min(BLOCK, share) if group is None else share)
    return blocks


def _group(each: Input) -> int | None:
    return each.group if isinstance(each, Row) else None


def _pack_block(inputs: Sequence[Input], numbers: list[int]) -> Any:
    import pyarrow

    columns = pack_inputs([inputs[each] for each in numbers])
    # as bytes: a path may not be UTF-8
    return pyarrow.table({"number": numbers, **columns})


def _build_row(label: Any, probability: Any, error: Any) -> Prediction:
    if error:
        return explain_failure(str(error))
    return {"label": str(label), "probability": float(probability), "top_3": [], "error": None}


def _set_up_ray_data() -> None:
    """Leave progress and messages to this project; let rows come while a block is worked on."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.target_max_block_size = ROW_BYTES
