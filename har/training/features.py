"""The frozen backbone over many images: each image in once, its features out, kept on disk.

Training and validation images may be computed in the CPU's bfloat16, which costs a hundredth of
precision and halves the time. Test images never: their features are those that the logged model
itself computes, in float32, so that the accuracy evaluated on them is the served model's.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tensorflow as tf

from har.data.manifest import Manifest, check_bytes, check_images
from har.inference.extractors import (
    EXTRACTORS,
    Extractor,
    Images,
    Prepared,
    check_extractor,
    choose_arithmetic,
)
from har.inference.freezing import run_once, trace
from har.models.devices import has_gpu
from har.recipe import Recipe
from har.training.augmentation import AUGMENTATIONS
from har.training.feature_cache import Features, Key, check_limit, load_or_compute
from har.training.loaders import Splits, build_stream_loader, check_feature_memory, prefetch
from har.util.errors import UserError, first_line
from har.util.hardware import available_cpus
from har.util.progress import progress, say
from har.util.signals import defer_interrupts

# Images that are read, and augmented, together.
READ_SIZE = 32
# Rows after which what is done is kept on disk, twice as many while that takes less than so many
# seconds: what an interruption can lose. Nothing is computed while it is kept. Whole READ_SIZEs,
# or augmented views would not come out equal after one.
CHUNK = 512
SAVE_EVERY_S = 30.0
CHECKED_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class FeatureSplits:
    """Features of every split: train (views, images, features), the others (images, features).

    `arithmetic` is that of the first two; `computed` of `needed` rows were not in the cache, and
    computing those that were had taken `saved_s`. `converted` is the network in the runtime's own
    form, None where that is Keras' or nothing was computed.
    """

    train: Features
    validation: Features
    test: Features
    arithmetic: str
    computed: int
    needed: int
    saved_s: float
    converted: Any

    @property
    def cache(self) -> str:
        """`miss`: all was computed; `hit`: some or all was in the cache."""
        return "miss" if self.computed == self.needed else "hit"


class Extraction:
    """One network over the images of one manifest. Nothing is compiled for what is cached."""

    def __init__(self, network: Any, manifest: Manifest, recipe: Recipe, runtime: str) -> None:
        """`network` maps images to features in float32; `runtime` is a key of PREPARE."""
        self.network, self.manifest, self.recipe = network, manifest, recipe
        self.runtime = runtime
        self.weights = digest_weights(network)
        self.prepared: Prepared | None = None
        self.checked: tuple[Images, Features]
        self.compiled: dict[str, Extractor] = {}
        self.computed = self.needed = 0
        self.saved_s = 0.0

    def features(
        self, rows: pd.DataFrame, *, view: int | None = None, exact: bool = False
    ) -> Features:
        """(rows, features) float32 of the images as they are, or of an augmented view of them."""
        augmented, recipe = view is not None, self.recipe
        arithmetic = choose_arithmetic(self.runtime, recipe, exact)
        key = Key(
            images=hashlib.sha256("\n".join(rows["sha256"]).encode()).hexdigest(),
            backbone=recipe.backbone,
            weights=self.weights,
            image_size=recipe.image_size,
            resize=recipe.resize,
            augmentation=recipe.augmentation if augmented else "none",
            view=view or 0,
            seed=recipe.seed if augmented else 0,
            runtime=f"{self.runtime} {version(self.runtime)}",
            device="GPU" if self.runtime == "tensorflow" and has_gpu() else "CPU",
            arithmetic=arithmetic,
        )
        shape = (len(rows), int(self.network.output_shape[-1]))
        if rows.empty:
            return np.empty(shape, np.float32)
        self.needed += len(rows)

        def compute(array: Features, done: int, keep: Callable[[int], None]) -> None:
            self.extract(rows, view, self.extractor(arithmetic, rows), array, done, keep)

        found = load_or_compute(key, shape, compute, lambda: check_bytes(self.manifest, rows))
        self.computed += found.computed
        self.saved_s += found.saved_s
        return found.array

    def extractor(self, arithmetic: str, rows: pd.DataFrame) -> Extractor:
        """Compiled at its first use, and then compared with Keras on the first images of all."""
        if self.prepared is None:
            say(f"compiling {self.recipe.backbone} for {self.runtime}")
            traced = trace(self.network, "float32")
            self.prepared = EXTRACTORS[self.runtime](self.network, traced, self.recipe)
            _, images = next(self.batches(rows, None, CHECKED_IMAGES, 0))
            self.checked = images, run_once(traced, images)
        if arithmetic not in self.compiled:
            self.compiled[arithmetic] = self.prepared.compile(arithmetic)
            check_extractor(self.compiled[arithmetic], *self.checked)
        return self.compiled[arithmetic]

    def extract(
        self,
        rows: pd.DataFrame,
        view: int | None,
        extractor: Extractor,
        array: Features,
        done: int,
        keep: Callable[[int], None],
    ) -> None:
        """Fill `array` from row `done` on, a chunk after the other; Ctrl-C between batches."""
        assert CHUNK % READ_SIZE == READ_SIZE % extractor.batch_size == 0
        name = f"features, {extractor.runtime} {extractor.arithmetic}"
        label = name if view is None else f"{name}, view {view + 1}"
        lock = threading.Lock()
        with progress(label, len(rows)) as advance, defer_interrupts() as checkpoint:
            advance(done)

            def sink(start: int, found: npt.NDArray[Any]) -> None:
                array[start : start + len(found)] = found
                with lock:
                    advance(len(found))

            batches, chunk = self.batches(rows, view, extractor.batch_size, done), CHUNK
            while done < len(rows):
                started = time.monotonic()
                done = min(done + chunk, len(rows))
                extractor.run(take_until(batches, done, checkpoint), sink)
                keep(done)
                checkpoint()
                if time.monotonic() - started < SAVE_EVERY_S / 2:
                    chunk *= 2

    def batches(
        self, rows: pd.DataFrame, view: int | None, size: int, first: int
    ) -> Iterator[tuple[int, Images]]:
        """(first row, at most `size` images) from row `first` on, decoded ahead of time."""
        change = AUGMENTATIONS["none" if view is None else self.recipe.augmentation]
        load = build_stream_loader(self.manifest, rows, self.recipe)
        drawn = tf.constant((view or 0) * len(rows), tf.int64)

        def finish(images: Any, indices: Any) -> tuple[Any, Any]:
            # what is drawn for images depends on where they start, not on where the work began
            seed = tf.stack([tf.cast(self.recipe.seed, tf.int64), drawn + indices[0]])
            return change(images, seed), indices[0]

        dataset = load(tf.data.Dataset.range(first, len(rows)), READ_SIZE, False)
        finished = prefetch(dataset.map(finish, num_parallel_calls=available_cpus()))
        try:
            for images, start in finished.as_numpy_iterator():
                for skipped in range(0, len(images), size):
                    # not before: whole READ_SIZEs wait as bytes, a quarter of the memory
                    part = images[skipped : skipped + size].astype(np.float32, copy=False)
                    yield int(start) + skipped, part
        except tf.errors.OpError as error:
            reason = f"an image cannot be read any more: {first_line(error)}"
            try:
                # which, TensorFlow does not always say
                check_images(self.manifest)
            except UserError as found:
                reason = str(found)
            raise UserError(f"{reason}; what is done is kept") from error


def take_until(
    batches: Iterator[tuple[int, Images]], end: int, checkpoint: Callable[[], None]
) -> Iterator[tuple[int, Images]]:
    """Batches up to row `end`."""
    for start, images in batches:
        checkpoint()
        yield start, images
        if start + len(images) >= end:
            return


def extract_splits(
    network: Any,
    manifest: Manifest,
    recipe: Recipe,
    runtime: str,
    splits: Splits,
) -> FeatureSplits:
    """Features of train and validation as fast as can be, and of the test split exactly.

    Raises:
        UserError: the runtime is not installed or disagrees with Keras; as `load_or_compute`.
    """
    extraction = Extraction(network, manifest, recipe, runtime)
    train, validation = splits.train, splits.validation
    images = len(manifest.rows("test")) + len(validation) + recipe.feature_views * len(train)
    # or the views would push each other out
    features = int(network.output_shape[-1])
    check_limit(images * features * 4)
    check_feature_memory(len(train), recipe.feature_views, features)
    if recipe.augmentation == "none":
        # both at once, so that another validation fraction finds them too
        both = manifest.rows("train")
        found = extraction.features(both)
        row_of = pd.Series(np.arange(len(both)), index=both["path"])
        train_features = found[row_of[train["path"]].to_numpy()][None]
        validation_features = found[row_of[validation["path"]].to_numpy()]
    else:
        views = [extraction.features(train, view=v) for v in range(recipe.feature_views)]
        train_features = np.stack(views)
        validation_features = np.asarray(extraction.features(validation))
    test = extraction.features(manifest.rows("test"), exact=True)
    return FeatureSplits(
        train=train_features,
        validation=validation_features,
        test=test,
        arithmetic=choose_arithmetic(runtime, recipe, exact=False),
        computed=extraction.computed,
        needed=extraction.needed,
        saved_s=extraction.saved_s,
        converted=extraction.prepared and extraction.prepared.converted,
    )


def digest_weights(network: Any) -> str:
    """SHA-256 of every weight's values."""
    found = hashlib.sha256()
    for weight in network.get_weights():
        found.update(np.ascontiguousarray(weight).data)
    return found.hexdigest()
