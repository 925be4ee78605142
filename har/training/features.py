"""Features: each image through the frozen backbone, or its first blocks, once; cached on disk in
shards.

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
from har.models.merging import fold_batch_norms
from har.recipe import Recipe
from har.training.augmentation import AUGMENTATIONS, mirror
from har.training.bad_images import find_bad_image
from har.training.disk_features import PickedFeatures, map_features
from har.training.feature_cache import Entry, Features, Key, check_limit, make_room, open_entry
from har.training.loaders import (
    Splits,
    build_stream_loader,
    check_feature_memory,
    fits_memory,
    prefetch,
)
from har.util.errors import UserError, first_line
from har.util.hardware import available_cpus
from har.util.progress import progress, say
from har.util.signals import defer_interrupts
from har.util.units import format_bytes

Images = npt.NDArray[np.float32]
# Images that are read, and augmented, together. A shard is a whole number of these, or augmented
# views would depend on which shards were missing.
READ_SIZE = 32
# Takes (first row, outputs).
Keep = Callable[[int, npt.NDArray[Any]], None]
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
class View:
    """A version of each image: as it is, its mirror image, or the `number`-th random change to it.

    Its height and width are `size` pixels.
    """

    size: int
    augmentation: str = "none"
    number: int = 0

    @property
    def is_random(self) -> bool:
        """Return whether the view depends on the seed."""
        return self.augmentation not in ("none", "mirror")


def training_views(recipe: Recipe) -> list[View]:
    """List the views of each training image."""
    if recipe.augmentation == "none":
        return [View(size=recipe.image_size)]
    if recipe.augmentation == "mirror":
        return _with_mirror_image(recipe.image_size)
    size, name = recipe.image_size, recipe.augmentation
    return [View(size=size, augmentation=name, number=n) for n in range(recipe.feature_views)]


def evaluation_views(recipe: Recipe) -> list[View]:
    """List the views of an image whose probabilities the finished model averages."""
    mirrored = _with_mirror_image(recipe.served_size)
    return mirrored if recipe.test_time == "mirror" else mirrored[:1]


def _with_mirror_image(size: int) -> list[View]:
    return [View(size=size), View(size=size, augmentation="mirror", number=1)]


@dataclass(frozen=True, kw_only=True)
class FeatureSplits:
    """Features, each of (views, images, ...). A head needs no test features of inner layers: then
    `test` is None. Those of training may lie on disk.
    """

    train: Features | PickedFeatures
    validation: Features
    test: Features | None
    extracted: Extracted


@dataclass(frozen=True, kw_only=True)
class Request:
    """Features to compute: of one view of `rows`, in parts, each a whole number of READ_SIZE rows
    or the last.
    """

    rows: pd.DataFrame
    view: View
    arithmetic: str
    parts: Sequence[range]


class Extraction:
    """Computes the features of one manifest's images by one network.

    `network` maps (batch, size, size, 3) float32 images of 0..255 to a (batch, ...) array: the
    whole backbone, or its layers before `cut`, whose larger features are kept as float16. It is
    compiled only if the cache lacks features.
    """

    def __init__(
        self, network: Any, manifest: Manifest, recipe: Recipe, runtime: str, cut: str = ""
    ) -> None:
        """`runtime` is a key of RUNTIMES."""
        self.network, self.manifest, self.recipe = network, manifest, recipe
        self.runtime, self.cut = runtime, cut
        self.dtype = np.dtype(np.float16 if cut else np.float32)
        self.weights = digest_weights(network)
        # by size, and by arithmetic and size
        self.converted: dict[int, Any] = {}
        self.compiled: dict[tuple[str, int], Compiled] = {}
        self.computed = self.needed = 0
        self.saved_s = 0.0

    @property
    def device(self) -> str:
        """What computes: GPU or CPU."""
        return "GPU" if self.runtime == "tensorflow" and has_gpu() else "CPU"

    def count_features(self, view: View) -> tuple[int, ...]:
        """Return the shape of one image's features."""
        size = (1, view.size, view.size, 3)
        return tuple(self.network.compute_output_shape(size)[1:])

    def all_views(
        self,
        rows: pd.DataFrame,
        views: Sequence[View],
        *,
        exact: bool = False,
        on_disk: bool = False,
    ) -> Features:
        """Return (views, rows, ...) features of several views of one size, perhaps `on_disk`."""
        allocate = map_features if on_disk else np.empty
        array = allocate((len(views), len(rows), *self.count_features(views[0])), self.dtype)
        for part, view in zip(array, views, strict=True):
            self._fill(part, rows, view, exact)
        return array

    def features(
        self, rows: pd.DataFrame, view: View | None = None, *, exact: bool = False
    ) -> Features:
        """Return (rows, ...) features of the images, or of another view of them."""
        return self.all_views(rows, [view or View(size=self.recipe.image_size)], exact=exact)[0]

    def _fill(self, array: Features, rows: pd.DataFrame, view: View, exact: bool) -> None:
        """Compute or read the (rows, ...) features of a view, in float32 arithmetic if `exact`.

        Raises:
            UserError: the cache has no room or cannot be written, the runtime disagrees with Keras,
                or an image is gone or changed. Finished shards stay.
        """
        if rows.empty:
            return
        arithmetic = choose_arithmetic(self.runtime, self.recipe.precision, exact)
        with open_entry(self._build_key(rows, view, arithmetic), array.shape) as entry:
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

    def _build_key(self, rows: pd.DataFrame, view: View, arithmetic: str) -> Key:
        recipe, augmentation = self.recipe, view.augmentation
        if augmentation == "crop_flip_color":
            augmentation += f" area={recipe.crop_area:g} of {recipe.source_size} px"
        return Key(
            images=hashlib.sha256("\n".join(rows["sha256"]).encode()).hexdigest(),
            backbone=recipe.backbone,
            weights=self.weights,
            image_size=view.size,
            resize=recipe.resize,
            augmentation=augmentation,
            view=view.number,
            seed=recipe.seed if view.is_random else 0,
            runtime=f"{self.runtime} {version(self.runtime)}",
            device=self.device,
            arithmetic=arithmetic,
            layer=self.cut,
        )

    def _compute(
        self,
        rows: pd.DataFrame,
        view: View,
        arithmetic: str,
        entry: Entry,
        missing: Sequence[int],
        array: Features,
    ) -> None:
        """Fill the missing shards of `array`, and write each into the cache."""
        parts = {entry.rows(shard): shard for shard in missing}
        to_do = sum(map(len, parts))
        make_room(entry, to_do * array[0].nbytes)
        label = f"features, {self.runtime} {arithmetic}"
        label += "" if view.augmentation == "none" else f", view {view.number + 1}"
        request = Request(rows=rows, view=view, arithmetic=arithmetic, parts=list(parts))
        self.prepare(request)
        with progress(label, len(rows)) as advance, defer_interrupts() as checkpoint:
            advance(len(rows) - to_do)

            def keep(start: int, outputs: npt.NDArray[Any]) -> None:
                array[start : start + len(outputs)] = outputs
                advance(len(outputs))

            for part, seconds in self.compute(request, keep, checkpoint):
                entry.write(parts[part], array[_slice(part)], seconds)
                checkpoint()

    def prepare(self, request: Request) -> None:
        """Do what takes long before the first image."""
        self._compile(request.arithmetic, request.rows, request.view.size)

    def compute(
        self, request: Request, keep: Keep, checkpoint: Callable[[], None]
    ) -> Iterator[tuple[range, float]]:
        """Compute a request's parts; yield each with the seconds it took when `keep` has got
        all of it as (first row, outputs), in any order. `checkpoint` may interrupt it.
        """
        rows, view = request.rows, request.view
        compiled = self._compile(request.arithmetic, rows, view.size)
        numbers = np.concatenate(request.parts)
        batches = self._read_batches(rows, view, numbers, compiled.batch_size)
        for part in request.parts:
            started = time.monotonic()
            run_batches(compiled, _take_until(batches, part.stop, checkpoint), keep)
            # an image that was changed meanwhile is not what the key says
            check_bytes(self.manifest, rows[_slice(part)])
            yield part, time.monotonic() - started

    def _compile(self, arithmetic: str, rows: pd.DataFrame, size: int) -> Compiled:
        """Compile at the first use, and compare with Keras on a few images."""
        runtime = RUNTIMES[self.runtime]
        if size not in self.converted:
            say(f"compiling {self.recipe.backbone} for {self.runtime}")
            any_size = self.network.input_shape[1] is None
            network = fold_batch_norms(self.network, size=size) if any_size else self.network
            self.converted[size] = runtime.convert(network)
        if (arithmetic, size) not in self.compiled:
            compiled = runtime.compile(self.converted[size], arithmetic)
            few = self._read_batches(rows, View(size=size), np.arange(len(rows)), CHECKED_IMAGES)
            _, images = next(few)
            expected = np.asarray(self.network(images, training=False))
            check_compiled(compiled, images, expected, runtime=self.runtime, arithmetic=arithmetic)
            self.compiled[arithmetic, size] = compiled
        return self.compiled[arithmetic, size]

    def _read_batches(
        self, rows: pd.DataFrame, view: View, numbers: npt.NDArray[np.int64], size: int
    ) -> Iterator[tuple[int, Images]]:
        """Yield (first row, at most `size` images) of the rows with these numbers, decoded ahead
        of time. Batches hold neighbours only where `numbers` are whole shards.
        """
        decoded = self.recipe.source_size if view.is_random else view.size
        load = build_stream_loader(self.manifest, rows, self.recipe.at_size(decoded))
        drawn = tf.constant(view.number * len(rows), tf.int64)

        def finish(images: Any, indices: Any) -> tuple[Any, Any]:
            if not view.is_random:
                return mirror(images) if view.number else images, indices[0]
            # random numbers depend on where a batch starts, not on where the work began
            seed = tf.stack([tf.cast(self.recipe.seed, tf.int64), drawn + indices[0]])
            return AUGMENTATIONS[view.augmentation](images, seed, self.recipe), indices[0]

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


def extract_splits(extraction: Extraction, splits: Splits) -> FeatureSplits:
    """Compute the features of train and validation as fast as possible, of the test split exactly,
    or not at all where they are those before a cut.

    Raises:
        UserError: as `Extraction.features`, or the features need more memory than is free.
    """
    started = time.monotonic()
    recipe, runtime, cut = extraction.recipe, extraction.runtime, extraction.cut
    train, validation = splits.train, splits.validation
    views, evaluated = training_views(recipe), evaluation_views(recipe)
    test = extraction.manifest.rows("test")[: 0 if cut else None]
    size, served = (
        int(np.prod(extraction.count_features(each[0]))) * extraction.dtype.itemsize
        for each in (views, evaluated)
    )
    # all of them must fit, or the views would push each other out
    check_limit(
        size * len(views) * len(train) + served * len(evaluated) * (len(validation) + len(test))
    )
    on_disk = _exceeds_memory(recipe, len(train), size)
    train_features, validation_features = _extract_training(extraction, splits, on_disk)
    test_features = None if cut else extraction.all_views(test, evaluated, exact=True)
    return FeatureSplits(
        train=train_features,
        validation=validation_features,
        test=test_features,
        extracted=Extracted(
            runtime=runtime,
            arithmetic=choose_arithmetic(runtime, recipe.precision, exact=False),
            computed=extraction.computed,
            needed=extraction.needed,
            seconds=time.monotonic() - started,
            saved_s=extraction.saved_s,
            converted=None if cut else extraction.converted.get(recipe.served_size),
        ),
    )


def _exceeds_memory(recipe: Recipe, images: int, size: int) -> bool:
    """Return whether training features, `size` bytes a view, must be read from disk in each epoch.

    Raises:
        UserError: they do not fit the memory, and a head that is solved for needs all at once.
    """
    views = training_views(recipe)
    needed = images * len(views) * size
    # where training and validation are computed at once, they are copied apart
    copies = 2 if views[0] == evaluation_views(recipe)[0] else 1
    if recipe.solved or fits_memory(copies * needed):
        check_feature_memory(images, len(views), size)
        return False
    say(f"features: {format_bytes(needed)} do not fit the memory: each epoch reads them from disk")
    return True


def _extract_training(
    extraction: Extraction, splits: Splits, on_disk: bool
) -> tuple[Features | PickedFeatures, Features]:
    """Compute train and validation, both (views, images, ...), train in memory or `on_disk`."""
    train, validation, recipe = splits.train, splits.validation, extraction.recipe
    views, evaluated = training_views(recipe), evaluation_views(recipe)
    if views[0] != evaluated[0]:
        found = extraction.all_views(train, views, on_disk=on_disk)
        return found, extraction.all_views(validation, evaluated)
    # both at once: another validation fraction finds them in the cache too
    both = extraction.manifest.rows("train")
    found = extraction.all_views(both, max(views, evaluated, key=len), on_disk=on_disk)
    row_of = pd.Series(np.arange(len(both)), index=both["path"])
    train_rows, validation_rows = (row_of[rows["path"]].to_numpy() for rows in (train, validation))
    of_train, of_validation = found[: len(views)], found[: len(evaluated), validation_rows]
    picked = PickedFeatures(of_train, train_rows) if on_disk else of_train[:, train_rows]
    return picked, of_validation


def digest_weights(network: Any) -> str:
    """SHA-256 of every weight's values."""
    found = hashlib.sha256()
    for weight in network.get_weights():
        found.update(np.ascontiguousarray(weight).data)
    return found.hexdigest()
