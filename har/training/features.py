"""Features: each image through the frozen backbone once, cached on disk in shards.

Training and validation images may be computed in the CPU's bfloat16, which costs a hundredth of
precision and halves the time. Test images are always computed in float32, as the logged model
computes them, so that the accuracy measured on them is the served model's.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tensorflow as tf

from har.data.manifest import Manifest, check_bytes
from har.inference.runtimes import (
    RUNTIMES,
    Compiled,
    check_compiled,
    choose_arithmetic,
    has_gpu,
    run_batches,
)
from har.recipe import Recipe
from har.training.augmentation import AUGMENTATIONS
from har.training.bad_images import find_bad_image
from har.training.feature_cache import Entry, Features, Key, check_limit, make_room, open_entry
from har.training.loaders import (
    Splits,
    build_stream_loader,
    check_feature_memory,
    prefetch,
)
from har.util.errors import UserError, first_line
from har.util.hardware import available_cpus
from har.util.progress import progress, say
from har.util.signals import defer_interrupts

Images = npt.NDArray[np.float32]
# Images that are read, and augmented, together. A shard is a whole number of these, or augmented
# views would depend on which shards were missing.
READ_SIZE = 32
CHECKED_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """The way features were computed.

    `arithmetic` is that of training and validation images. `computed` of `needed` rows were not in
    the cache; computing the others had taken `saved_s` seconds before. `seconds` is what it took
    now. `converted` is the backbone in the runtime's own form, None if nothing was computed.
    """

    runtime: str
    arithmetic: str
    computed: int
    needed: int
    seconds: float
    saved_s: float
    converted: Any

    @property
    def cache(self) -> str:
        """`miss`: every row was computed now; `hit`: some or all were in the cache."""
        return "miss" if self.computed == self.needed else "hit"


@dataclass(frozen=True, kw_only=True)
class FeatureSplits:
    """Features as float32: train (views, images, ...), validation and test (images, ...)."""

    train: Features
    validation: Features
    test: Features
    extracted: Extracted


class Extraction:
    """Computes the features of one manifest's images by one network.

    `network` maps (batch, size, size, 3) float32 images of 0..255 to a (batch, ...) array: the
    whole backbone, or its first layers. It is compiled only if the cache lacks features.
    """

    def __init__(self, network: Any, manifest: Manifest, recipe: Recipe, runtime: str) -> None:
        """`runtime` is a key of RUNTIMES."""
        self.network, self.manifest, self.recipe = network, manifest, recipe
        self.runtime = runtime
        self.weights = digest_weights(network)
        # a whole backbone ends in (batch, features)
        self.layer = network.layers[-1].name if len(network.output_shape) > 2 else ""
        self.converted: Any = None
        self.compiled: dict[str, Compiled] = {}
        self.computed = self.needed = 0
        self.saved_s = 0.0

    def features(
        self, rows: pd.DataFrame, *, view: int | None = None, exact: bool = False
    ) -> Features:
        """Return (rows, ...) float32 features of the images, or of an augmented view of them;
        in float32 arithmetic if `exact`.

        Raises:
            UserError: the cache has no room or cannot be written, the runtime disagrees with Keras,
                or an image is gone or changed. Finished shards stay.
        """
        shape = (len(rows), *self.network.output_shape[1:])
        array = np.empty(shape, np.float32)
        if rows.empty:
            return array
        arithmetic = choose_arithmetic(self.runtime, self.recipe.precision, exact)
        with open_entry(self._build_key(rows, view, arithmetic), shape) as entry:
            missing = []
            for shard in range(entry.num_shards):
                if (found := entry.read(shard)) is None:
                    missing.append(shard)
                else:
                    array[_slice(entry.rows(shard))], seconds = found
                    self.saved_s += seconds
            if missing:
                self._compute(rows, view, arithmetic, entry, missing, array)
        self.needed += len(rows)
        self.computed += sum(len(entry.rows(shard)) for shard in missing)
        return array

    def _build_key(self, rows: pd.DataFrame, view: int | None, arithmetic: str) -> Key:
        augmented, recipe = view is not None, self.recipe
        return Key(
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
            layer=self.layer,
        )

    def _compute(
        self,
        rows: pd.DataFrame,
        view: int | None,
        arithmetic: str,
        entry: Entry,
        missing: Sequence[int],
        array: Features,
    ) -> None:
        """Fill the missing shards of `array`, and write each into the cache."""
        to_do = np.concatenate([entry.rows(shard) for shard in missing])
        make_room(entry, len(to_do) * array[0].nbytes)
        compiled = self._compile(arithmetic, rows)
        batches = self._read_batches(rows, view, to_do, compiled.batch_size)
        label = f"features, {self.runtime} {arithmetic}"
        label += "" if view is None else f", view {view + 1}"
        with progress(label, len(rows)) as advance, defer_interrupts() as checkpoint:
            advance(len(rows) - len(to_do))

            def keep(start: int, outputs: npt.NDArray[Any]) -> None:
                array[start : start + len(outputs)] = outputs
                advance(len(outputs))

            for shard in missing:
                started, part = time.monotonic(), _slice(entry.rows(shard))
                run_batches(compiled, _take_until(batches, part.stop, checkpoint), keep)
                # an image that was changed meanwhile is not what the key says
                check_bytes(self.manifest, rows[part])
                entry.write(shard, array[part], time.monotonic() - started)
                checkpoint()

    def _compile(self, arithmetic: str, rows: pd.DataFrame) -> Compiled:
        """Compile at the first use, and compare with Keras on a few images."""
        runtime = RUNTIMES[self.runtime]
        if self.converted is None:
            say(f"compiling {self.recipe.backbone} for {self.runtime}")
            self.converted = runtime.convert(self.network)
        if arithmetic not in self.compiled:
            compiled = runtime.compile(self.converted, arithmetic)
            _, images = next(self._read_batches(rows, None, np.arange(len(rows)), CHECKED_IMAGES))
            expected = np.asarray(self.network(images, training=False))
            check_compiled(compiled, images, expected, runtime=self.runtime, arithmetic=arithmetic)
            self.compiled[arithmetic] = compiled
        return self.compiled[arithmetic]

    def _read_batches(
        self, rows: pd.DataFrame, view: int | None, numbers: npt.NDArray[np.int64], size: int
    ) -> Iterator[tuple[int, Images]]:
        """Yield (first row, at most `size` images) of the rows with these numbers, decoded ahead
        of time. Batches hold neighbours only where `numbers` are whole shards.
        """
        change = AUGMENTATIONS["none" if view is None else self.recipe.augmentation]
        load = build_stream_loader(self.manifest, rows, self.recipe)
        drawn = tf.constant((view or 0) * len(rows), tf.int64)

        def finish(images: Any, indices: Any) -> tuple[Any, Any]:
            # random numbers depend on where a batch starts, not on where the work began
            seed = tf.stack([tf.cast(self.recipe.seed, tf.int64), drawn + indices[0]])
            return change(images, seed), indices[0]

        dataset = load(tf.data.Dataset.from_tensor_slices(numbers), READ_SIZE, False)
        finished = prefetch(dataset.map(finish, num_parallel_calls=available_cpus()))
        try:
            for images, start in finished.as_numpy_iterator():
                for skipped in range(0, len(images), size):
                    # converted late: READ_SIZE images wait as bytes, a quarter of the memory
                    part = images[skipped : skipped + size].astype(np.float32, copy=False)
                    yield int(start) + skipped, part
        except tf.errors.OpError as error:
            raise self._explain_image_error(error) from error

    def _explain_image_error(self, error: Exception) -> UserError:
        # TensorFlow does not always name the image
        found = find_bad_image(self.manifest)
        reason = str(found) if found else f"an image can no longer be read: {first_line(error)}"
        return UserError(f"{reason}; the features computed so far are cached")


def _slice(rows: range) -> slice:
    return slice(rows.start, rows.stop)


def _take_until(
    batches: Iterator[tuple[int, Images]], end: int, checkpoint: Callable[[], None]
) -> Iterator[tuple[int, Images]]:
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
    """Compute the features of train and validation as fast as possible, of the test split exactly.

    Raises:
        UserError: as `Extraction.features`, or the features need more memory than is free.
    """
    started = time.monotonic()
    extraction = Extraction(network, manifest, recipe, runtime)
    train, validation = splits.train, splits.validation
    images = len(manifest.rows("test")) + len(validation) + recipe.feature_views * len(train)
    features = int(np.prod(network.output_shape[1:]))
    # all of them must fit, or the views would push each other out
    check_limit(images * features * 4)
    check_feature_memory(len(train), recipe.feature_views, features)
    train_features, validation_features = _extract_training(extraction, splits)
    test = extraction.features(manifest.rows("test"), exact=True)
    return FeatureSplits(
        train=train_features,
        validation=validation_features,
        test=test,
        extracted=Extracted(
            runtime=runtime,
            arithmetic=choose_arithmetic(runtime, recipe.precision, exact=False),
            computed=extraction.computed,
            needed=extraction.needed,
            seconds=time.monotonic() - started,
            saved_s=extraction.saved_s,
            converted=extraction.converted,
        ),
    )


def _extract_training(extraction: Extraction, splits: Splits) -> tuple[Features, Features]:
    """Compute train (views, images, ...) and validation (images, ...)."""
    train, validation, recipe = splits.train, splits.validation, extraction.recipe
    if recipe.augmentation != "none":
        views = [extraction.features(train, view=view) for view in range(recipe.feature_views)]
        return np.stack(views), extraction.features(validation)
    # both at once: another validation fraction finds them in the cache too
    both = extraction.manifest.rows("train")
    found = extraction.features(both)
    row_of = pd.Series(np.arange(len(both)), index=both["path"])
    train_rows, validation_rows = (row_of[rows["path"]].to_numpy() for rows in (train, validation))
    return found[train_rows][None], found[validation_rows]


def digest_weights(network: Any) -> str:
    """SHA-256 of every weight's values."""
    found = hashlib.sha256()
    for weight in network.get_weights():
        found.update(np.ascontiguousarray(weight).data)
    return found.hexdigest()
