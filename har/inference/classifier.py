"""A trained classifier, on disk and in memory: maps the bytes of images to labels.

Its folder holds `model.keras` (float32, one device), files of its runtime, and `classifier.json`
(class names, recipe, runtime). That is all it takes to decode an image as in training and to
classify it.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from har.data.encoded import EncodedImage
from har.data.images import RESIZERS, ImageError, Pixels, decode, decode_small, open_image
from har.data.limits import TRAINING_LIMITS, UNLIMITED, Limits, RequestLimits
from har.inference.runtimes import BATCH_SIZE, MODEL_FILE, RUNTIMES, Forward, Parts
from har.inference.turns import Caller, Turns
from har.models.keras_file import check_keras_file
from har.recipe import Recipe
from har.util.errors import UserError, first_line
from har.util.files import digest_file, read_regular_file
from har.util.hardware import available_cpus
from har.util.json_text import parse_json

CLASSIFIER_FOLDER = "classifier"
FACTS_FILE = "classifier.json"
TOP_K = 3
STOPPED = "nobody waits for the answer any more"
# 10,000 classes with long names have a megabyte; EfficientNetB7 has a quarter of a gigabyte.
MAX_FACTS_BYTES = 20_000_000
MAX_FILE_BYTES = 2_000_000_000


class Guess(TypedDict):
    """A class name and its probability, 0 to 1."""

    label: str
    probability: float


class Prediction(TypedDict):
    """The answer for one image: a label and its probability, or an error.

    `top_3` holds the most probable guesses, best first; it is empty with an error. `error` is null
    or says why the image has no label.
    """

    label: str | None
    probability: float | None
    top_3: list[Guess]
    error: str | None


def explain_failure(error: str) -> Prediction:
    """Build the prediction for an image that cannot be classified."""
    return {"label": None, "probability": None, "top_3": [], "error": error}


@functools.cache
def decoders() -> Turns:
    """The threads that decode, one for each processor, shared by all callers: at most that many
    images are decoded in full size at a time. The decoders let other threads run meanwhile.
    """
    return Turns(available_cpus(), "decode")


@functools.cache
def _forwards() -> Turns:
    """The threads that compute, so that a few images need not share with many batches."""
    return Turns(available_cpus(), "forward")


def _expect_bytes(data: Any) -> bytes:
    if not isinstance(data, bytes):
        raise ImageError(f"not bytes but {type(data).__name__}")
    return data


def _guess_cost(data: Any) -> float:
    """Guess what reading a header costs, in decoded pixels."""
    return 20_000 + (len(data) if isinstance(data, str | bytes) else 0)


def _known_cost(image: EncodedImage | str) -> float:
    return 0 if isinstance(image, str) else image.pixels + len(image.data)


class _Call:
    """What one call of `classify` may still cost, and its place among other calls."""

    def __init__(self, limits: RequestLimits, is_stopped: Callable[[], bool]) -> None:
        self.limits, self.is_stopped = limits, is_stopped
        self.started, self.pixels = time.monotonic(), 0
        self.decoding, self.computing = Caller(), Caller()

    def check_time(self) -> None:
        if self.is_stopped():
            raise ImageError(STOPPED)
        if time.monotonic() - self.started > self.limits.seconds:
            raise ImageError(
                f"took too long: {self.limits.seconds:.0f} s passed before this image was read;"
                " send it again, with fewer others"
            )

    def spend(self, image: EncodedImage | str) -> EncodedImage | str:
        """Count an image's pixels; return an error's text if they are too many."""
        if isinstance(image, str):
            return image
        if self.pixels + image.pixels > self.limits.pixels:
            return (
                f"the images of one request may have {self.limits.pixels:,} pixels together: send"
                " this one in another"
            )
        self.pixels += image.pixels
        return image

    def map_in_turn(
        self, work: Callable[[Any], Any], items: Sequence[Any], cost: Callable[[Any], float]
    ) -> list[Any]:
        futures = [
            decoders().submit(self.decoding, cost(each), partial(work, each)) for each in items
        ]
        return [each.result() for each in futures]

    def forward(self, run: Callable[[], Any], images: Sequence[Pixels]) -> Any:
        return _forwards().submit(self.computing, len(images), run).result() if images else ()


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Decodes images as in training and classifies them.

    `forward` maps (batch, size, size, 3) uint8 to (batch, classes) float32 probabilities, computed
    by `runtime`, a key of RUNTIMES. An image beyond `limits` is an error of that image.
    """

    forward: Forward
    class_names: tuple[str, ...]
    recipe: Recipe
    runtime: str
    limits: Limits = TRAINING_LIMITS

    def warm(self) -> None:
        """Do now what the first call of each kind would otherwise wait for."""
        size = self.recipe.served_size
        RESIZERS[self.recipe.resize](np.zeros((2, 2, 3), np.uint8), size)
        self.classify([b"no image: this starts the threads that decode"])
        for bucket in self.forward.buckets:
            self.forward(np.zeros((bucket, size, size, 3), np.uint8))

    def classify(
        self,
        files: Sequence[Any],
        read: Callable[[Any], bytes] = _expect_bytes,
        limits: RequestLimits = UNLIMITED,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> list[Prediction]:
        """Classify files; one that fails does not affect the others.

        `read` turns an element of `files` into the bytes of an image, or raises an ImageError.
        Images beyond `limits` are errors, and so are all that are left when `is_stopped`.
        """
        call = _Call(limits, is_stopped)
        rows: list[Prediction] = []
        for start in range(0, len(files), BATCH_SIZE):
            if is_stopped():
                return rows + [explain_failure(STOPPED) for _ in files[start:]]
            rows += self._classify_batch(files[start : start + BATCH_SIZE], read, call)
        return rows

    def _classify_batch(
        self, files: Sequence[Any], read: Callable[[Any], bytes], call: "_Call"
    ) -> list[Prediction]:
        # a thread of a server only waits: dozens of them would share the time of Python's lock
        opened = call.map_in_turn(lambda data: self._open(data, read, call), files, _guess_cost)
        opened = [call.spend(each) for each in opened]
        found = call.map_in_turn(lambda image: self._decode(image, call), opened, _known_cost)
        images = [each for each in found if not isinstance(each, str)]
        rows = iter(call.forward(lambda: self.forward(np.stack(images)), images))
        return [
            explain_failure(each) if isinstance(each, str) else self.predict_from(next(rows))
            for each in found
        ]

    def _open(self, data: Any, read: Callable[[Any], bytes], call: "_Call") -> EncodedImage | str:
        """Read a header; return an error's text if that is impossible."""
        try:
            call.check_time()
            return open_image(read(data), self.limits)
        except ImageError as error:
            return str(error)

    def _decode(self, image: EncodedImage | str, call: "_Call") -> Pixels | str:
        if isinstance(image, str):
            return image
        try:
            call.check_time()
            return decode_small(image, self.recipe.resize, self.recipe.served_size)
        except ImageError as error:
            return str(error)

    def decode(self, data: bytes) -> Pixels:
        """Decode an image as in training; raise an ImageError if that is impossible."""
        return decode(data, self.recipe.resize, self.recipe.served_size, self.limits)

    def predict_from(self, probabilities: npt.NDArray[np.float32]) -> Prediction:
        """Build the prediction from an image's (classes,) probabilities."""
        # NaN is no JSON
        if not np.isfinite(probabilities).all():
            return explain_failure("the model's numbers are not finite: its training went wrong")
        best = np.argsort(-probabilities, kind="stable")[:TOP_K]
        top: list[Guess] = [
            {"label": self.class_names[i], "probability": float(probabilities[i])} for i in best
        ]
        return {**top[0], "top_3": top, "error": None}


def save_classifier(
    folder: Path,
    model: Any,
    class_names: tuple[str, ...],
    recipe: Recipe,
    runtime: str = "tensorflow",
    parts: Parts | None = None,
) -> None:
    """Save a Keras model as a classifier into `folder`, which is created if need be; `parts` is
    the same model with its backbone converted for the runtime before.
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
    """Read class_names, recipe, runtime and the files' digests, as `save_classifier` wrote them.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged or somebody else's.
    """
    facts: dict[str, Any] = parse_json(read_regular_file(folder / FACTS_FILE, MAX_FACTS_BYTES))
    names, digests = facts["class_names"], facts["sha256"]
    if not isinstance(names, list) or not names or not all(type(name) is str for name in names):
        raise ValueError(f"{FACTS_FILE} names no classes")
    if facts["runtime"] not in RUNTIMES:
        raise ValueError(f"runtime {facts['runtime']!r}, none of {', '.join(RUNTIMES)}")
    # a path or a link would lead out of the folder
    if foreign := [name for name in digests if not _is_file_name(name)]:
        raise ValueError(f"{FACTS_FILE} names {foreign[0]!r}, no file of its folder")
    if missing := sorted({MODEL_FILE, *RUNTIMES[facts["runtime"]].files} - set(digests)):
        raise ValueError(f"{FACTS_FILE} has no digest of {missing[0]}")
    return facts


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..") and "\0" not in name


def _check_file(file: Path, digest: str) -> None:
    """Raise an error unless a file is the one that was saved, and small enough to be loaded."""
    if file.is_symlink():
        raise ValueError(f"{file.name} is a link")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise ValueError(f"{file.name} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    if digest_file(file) != digest:
        raise UserError(f"{file} is not the file that was saved: log the model again")


def load_classifier(folder: Path) -> Classifier:
    """Load what `save_classifier` saved."""
    try:
        facts = read_facts(folder)
        # before anything is read from them
        for name, digest in facts["sha256"].items():
            _check_file(folder / name, digest)
        check_keras_file(folder / MODEL_FILE)
        return Classifier(
            forward=RUNTIMES[facts["runtime"]].load(folder),
            class_names=tuple(facts["class_names"]),
            recipe=Recipe(**facts["recipe"]),
            runtime=facts["runtime"],
        )
    except UserError:
        raise
    # a file that a runtime cannot read makes it raise anything at all
    except Exception as error:
        raise UserError(
            f"{folder} holds no classifier that this version can read: {first_line(error)}"
        ) from error
