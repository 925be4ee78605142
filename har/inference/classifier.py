"""A trained classifier on disk and in memory: bytes of images in, labels out.

The folder holds `model.keras` (float32, one device), what the classifier's runtime needs beside
it, and `classifier.json` (class names, recipe, runtime): all that is needed to decode an image as
training did and to name what it shows.
"""

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from har.data.images import RESIZERS, ImageError, Pixels, decode
from har.inference.runtimes import BATCH_SIZE, MODEL_FILE, RUNTIMES, Forward, Parts
from har.recipe import Recipe
from har.util.errors import UserError, first_line
from har.util.files import digest_file
from har.util.hardware import available_cpus

CLASSIFIER_FOLDER = "classifier"
FACTS_FILE = "classifier.json"
TOP_K = 3


@functools.cache
def decoders() -> ThreadPoolExecutor:
    """The threads that decode, one a processor, for all callers together: that many images at
    most lie decoded in full size. Pillow lets other threads run while it decodes.
    """
    return ThreadPoolExecutor(available_cpus(), thread_name_prefix="decode")


def _expect_bytes(data: Any) -> bytes:
    """The file itself.

    Raises:
        ImageError: it is of another type.
    """
    if not isinstance(data, bytes):
        raise ImageError(f"not bytes but {type(data).__name__}")
    return data


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """`forward` maps (batch, size, size, 3) uint8 to (batch, classes) float32 probabilities,
    computed by `runtime`, a key of RUNTIMES.
    """

    forward: Forward
    class_names: tuple[str, ...]
    recipe: Recipe
    runtime: str

    def warm(self) -> None:
        """Do once what a first call of each kind would have to wait for."""
        size = self.recipe.image_size
        RESIZERS[self.recipe.resize](np.zeros((2, 2, 3), np.uint8), size)
        self.classify([b"no image: now every image plugin is loaded"])
        for bucket in self.forward.buckets:
            self.forward(np.zeros((bucket, size, size, 3), np.uint8))

    def classify(
        self, files: Sequence[Any], read: Callable[[Any], bytes] = _expect_bytes
    ) -> list[dict[str, Any]]:
        """One row a file: label, probability, top_3, error.

        `read` turns an element of `files` into the bytes of an image, or raises an ImageError.
        `error` is None, or says why this file has no label; its neighbours are not touched.
        `top_3` is a list of {label, probability}, the most probable first.
        """
        rows = []
        for start in range(0, len(files), BATCH_SIZE):
            rows += self.classify_batch(files[start : start + BATCH_SIZE], read)
        return rows

    def classify_batch(
        self, files: Sequence[Any], read: Callable[[Any], bytes]
    ) -> list[dict[str, Any]]:
        """`classify`, with as many decoded images in memory as there are files."""

        def decode_or_say(data: Any) -> Pixels | str:
            try:
                return self.decode(read(data))
            except ImageError as error:
                return str(error)

        found = list(decoders().map(decode_or_say, files))
        images = [each for each in found if not isinstance(each, str)]
        rows = iter(self.forward(np.stack(images)) if images else ())
        return [
            self.describe(None, each) if isinstance(each, str) else self.describe(next(rows), None)
            for each in found
        ]

    def decode(self, data: bytes) -> Pixels:
        """Bytes to pixels, as in training."""
        return decode(data, self.recipe.resize, self.recipe.image_size)

    def describe(self, row: npt.NDArray[np.float32] | None, error: str | None) -> dict[str, Any]:
        """One image's output row, of plain Python values."""
        # NaN is no JSON
        if row is not None and not np.isfinite(row).all():
            row, error = None, "the model's numbers are not finite: its training went wrong"
        if row is None:
            return {"label": None, "probability": None, "top_3": [], "error": error}
        best = np.argsort(-row, kind="stable")[:TOP_K]
        top = [{"label": self.class_names[i], "probability": float(row[i])} for i in best]
        return {**top[0], "top_3": top, "error": None}


def save_classifier(
    folder: Path,
    model: Any,
    class_names: tuple[str, ...],
    recipe: Recipe,
    runtime: str = "tensorflow",
    parts: Parts | None = None,
) -> None:
    """Write a Keras model and what goes with it into `folder`, made if need be; `parts` is the same
    model where its backbone was converted for the runtime before.

    Raises:
        UserError: the runtime is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / MODEL_FILE)
    RUNTIMES[runtime].save(model, folder, parts)
    digests = {each.name: digest_file(each) for each in sorted(folder.iterdir())}
    facts = {
        "class_names": class_names,
        "recipe": asdict(recipe),
        "runtime": runtime,
        "sha256": digests,
    }
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2), encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """class_names, recipe, runtime and the files' digests, as `save_classifier` wrote them."""
    facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return facts


def load_classifier(folder: Path) -> Classifier:
    """Read what `save_classifier` wrote.

    Raises:
        UserError: the folder does not hold a classifier, or its runtime is not installed.
    """
    try:
        facts = read_facts(folder)
        # before anything is read from them
        for name, digest in facts["sha256"].items():
            if digest_file(folder / name) != digest:
                raise UserError(
                    f"{folder / name} is not the file that was saved: log the model anew"
                )
        return Classifier(
            forward=RUNTIMES[facts["runtime"]].load(folder),
            class_names=tuple(facts["class_names"]),
            recipe=Recipe(**facts["recipe"]),
            runtime=facts["runtime"],
        )
    except UserError:
        raise
    # OpenVINO says RuntimeError of a file it cannot read
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{folder} holds no classifier that this version can read: {first_line(error)}"
        ) from error
