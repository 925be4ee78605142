"""The frozen backbone over many images: each image in once, its features out, kept on disk.

Training and validation images may be computed in the CPU's bfloat16, which costs a hundredth of
precision and halves the time. Test images never: their features are those that the logged model
itself computes, in float32, so that the accuracy judged on them is the served model's.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import tensorflow as tf

from har.backbones import build_backbone, copy_weights
from har.devices import precision_policy
from har.errors import UserError, first_line
from har.feature_cache import Features, Key, check_limit, load_or_compute
from har.graphs import run_once, trace
from har.interrupts import interrupts_at_checkpoints
from har.manifest import Manifest, check_bytes, check_images
from har.pipeline import (
    AUGMENTATIONS,
    Splits,
    ahead,
    build_stream_loader,
    check_feature_memory,
)
from har.progress import progress, say
from har.recipe import Recipe
from har.runtimes import (
    available_cpus,
    compile_tensorflow,
    convert_to_openvino,
    has_bfloat16,
    openvino_core,
)

# OpenVINO computes several batches at once; small ones stay in the processor's caches: by four,
# EfficientNetB7 is 4 % faster than by eight in bfloat16, a tenth in float32.
BATCH_SIZES = {"tensorflow": 32, "openvino": 4}
# Images that are read, and augmented, together.
READ_SIZE = 32
# Rows after which what is done is kept on disk, twice as many while that takes less than so many
# seconds: what an interruption can lose. Nothing is computed while it is kept. Whole READ_SIZEs,
# or augmented views would not come out equal after one.
CHUNK = 512
KEPT_AFTER_S = 30.0
# Of a runtime's features against Keras' own, as a relative distance.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
CHECKED_IMAGES = 8

Images = npt.NDArray[np.float32]
Sink = Callable[[int, npt.NDArray[Any]], None]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network compiled for going over many images.

    `run(batches, sink)` takes (first row, (batch, size, size, 3) float32 of 0..255) and gives
    (first row, (batch, features)), in any order and from any thread.
    """

    runtime: str
    arithmetic: str
    batch_size: int
    run: Callable[[Iterable[tuple[int, Images]], Sink], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A network that a runtime can compile for an arithmetic; `converted` is the runtime's own
    form of it, None where that is Keras'.
    """

    compile: Callable[[str], Extractor]
    converted: Any = None


# Of a network, its trace in float32, and a recipe.
Prepare = Callable[[Any, Any, Recipe], Prepared]


def choose_arithmetic(runtime: str, recipe: Recipe, exact: bool) -> str:
    """float32 if exact; else the recipe's precision on a GPU, and bfloat16 where a CPU has it."""
    if exact:
        return "float32"
    if runtime == "tensorflow" and has_gpu():
        return recipe.precision.removeprefix("mixed_")
    return "bfloat16" if has_bfloat16() else "float32"


def has_gpu() -> bool:
    """Whether TensorFlow sees one."""
    return bool(tf.config.list_physical_devices("GPU"))


def prepare_tensorflow(network: Any, traced: Any, recipe: Recipe) -> Prepared:
    """By Keras' policies on a GPU; on a CPU one graph, that oneDNN computes in float32 or in
    bfloat16.
    """

    @cache
    def compile_under(policy: str) -> Any:
        plain = policy == "float32"
        model = network if plain else under_policy(network, recipe, policy)
        return compile_tensorflow(model, "float32")

    def compile_network(arithmetic: str) -> Extractor:
        rewrite = arithmetic == "bfloat16" and not has_gpu()
        policy = "float32" if rewrite or arithmetic == "float32" else f"mixed_{arithmetic}"
        forward = compile_under(policy)

        def run(batches: Iterable[tuple[int, Images]], sink: Sink) -> None:
            def infer(start: int, images: Images) -> None:
                sink(start, forward(images).numpy())

            # at every call: without the option a function that was rewritten runs as it was
            with onednn_bfloat16(rewrite):
                # on a CPU one batch's small steps fill what another's leave idle
                in_threads(batches, 1 if has_gpu() else 2, lambda: infer)

        return Extractor(
            runtime="tensorflow",
            arithmetic=arithmetic,
            batch_size=BATCH_SIZES["tensorflow"],
            run=run,
        )

    return Prepared(compile=compile_network)


def under_policy(network: Any, recipe: Recipe, policy: str) -> Any:
    """A network with the same weights that computes by another Keras policy."""
    with precision_policy(policy):
        # the weights are copied: no need to read them again
        copy = build_backbone(replace(recipe, weights="random"))
    copy_weights(network, copy)
    return copy


@contextmanager
def onednn_bfloat16(wanted: bool) -> Iterator[None]:
    """Meanwhile TensorFlow may run graphs rewritten to bfloat16."""
    option = "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: wanted})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: False})


def prepare_openvino(network: Any, traced: Any, recipe: Recipe) -> Prepared:
    """Converted once; as many batches at once as the CPU has use for."""
    model = convert_to_openvino(traced)

    def compile_network(arithmetic: str) -> Extractor:
        options = {
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[arithmetic],
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": str(available_cpus()),
        }
        compiled = openvino_core().compile_model(model, "CPU", options)

        def run(batches: Iterable[tuple[int, Images]], sink: Sink) -> None:
            # one more than compute at once: none waits for Python to hand over images
            in_threads(batches, available_cpus() + 1, lambda: infer_into(compiled, sink))

        return Extractor(
            runtime="openvino",
            arithmetic=arithmetic,
            batch_size=BATCH_SIZES["openvino"],
            run=run,
        )

    return Prepared(compile=compile_network, converted=model)


def infer_into(compiled: Any, sink: Sink) -> Callable[[int, Images], None]:
    """A request of OpenVINO's own, as a function that computes a batch and hands on its features.

    Not its queue of requests: that calls Python from OpenVINO's threads, and where the last such
    call is still returning while the network is freed, both wait for each other for ever (2026.4).
    """
    request = compiled.create_infer_request()

    def infer(start: int, images: Images) -> None:
        (found,) = request.infer([images], share_inputs=True, share_outputs=True).values()
        sink(start, found)

    return infer


def in_threads(
    batches: Iterable[tuple[int, Images]],
    count: int,
    build_worker: Callable[[], Callable[[int, Images], None]],
) -> None:
    """Hand the batches out to `count` workers, each in a thread; all have ended afterwards.

    Raises:
        Exception: what the batches or a worker raised.
    """
    iterator, lock = iter(batches), threading.Lock()

    def work() -> None:
        worker = build_worker()
        while True:
            with lock:
                batch = next(iterator, None)
            if batch is None:
                return
            worker(*batch)

    with ThreadPoolExecutor(count) as pool:
        working = [pool.submit(work) for _ in range(count)]
    for each in working:
        each.result()


PREPARE: dict[str, Prepare] = {
    "tensorflow": prepare_tensorflow,
    "openvino": prepare_openvino,
}


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
    def state(self) -> str:
        """`cold`: all was computed; `warm`: some or all was there."""
        return "cold" if self.computed == self.needed else "warm"


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
            self.prepared = PREPARE[self.runtime](self.network, traced, self.recipe)
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
        with progress(label, len(rows)) as advance, interrupts_at_checkpoints() as checkpoint:
            advance(done)

            def sink(start: int, found: npt.NDArray[Any]) -> None:
                array[start : start + len(found)] = found
                with lock:
                    advance(len(found))

            batches, chunk = self.batches(rows, view, extractor.batch_size, done), CHUNK
            while done < len(rows):
                started = time.monotonic()
                done = min(done + chunk, len(rows))
                extractor.run(until(batches, done, checkpoint), sink)
                keep(done)
                checkpoint()
                if time.monotonic() - started < KEPT_AFTER_S / 2:
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
            return tf.cast(change(images, seed), tf.float32), indices[0]

        dataset = load(tf.data.Dataset.range(first, len(rows)), READ_SIZE, False)
        finished = ahead(dataset.map(finish, num_parallel_calls=available_cpus()))
        try:
            for images, start in finished.as_numpy_iterator():
                for skipped in range(0, len(images), size):
                    yield int(start) + skipped, images[skipped : skipped + size]
        except tf.errors.OpError as error:
            reason = f"an image cannot be read any more: {first_line(error)}"
            try:
                # which, TensorFlow does not always say
                check_images(self.manifest)
            except UserError as found:
                reason = str(found)
            raise UserError(f"{reason}; what is done is kept") from error


def until(
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


def check_extractor(extractor: Extractor, images: Images, expected: Features) -> None:
    """Raise a UserError unless it makes `expected` of `images`, as Keras does in float32."""
    found = np.empty_like(expected)

    def sink(start: int, features: npt.NDArray[Any]) -> None:
        found[start : start + len(features)] = features

    extractor.run([(0, images)], sink)
    distance = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not distance <= (allowed := TOLERANCE[extractor.arithmetic]):
        other = "tensorflow" if extractor.runtime == "openvino" else "openvino"
        raise UserError(
            f"runtime {extractor.runtime} ({extractor.arithmetic}) differs from Keras by"
            f" {distance:.2g} of the features' length, more than {allowed:g}: try --runtime {other}"
            " or --loader stream"
        )
