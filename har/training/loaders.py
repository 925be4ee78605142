"""Manifest to tf.data: splits, loaders, augmentation.

A training data set is one stream over all epochs. Everything random in it is a function of (seed,
epoch, position): on any machine the same recipe sees the same images in the same order, also in a
training that is resumed at epoch 7.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from har.data.images import decode_in_graph
from har.data.manifest import Manifest
from har.data.splits import hold_out
from har.recipe import Recipe
from har.training.augmentation import AUGMENTATIONS, MIXINGS
from har.training.disk_features import PickedFeatures
from har.training.feature_cache import Features
from har.util.errors import UserError
from har.util.hardware import available_cpus
from har.util.process import free_memory
from har.util.progress import progress
from har.util.units import format_bytes

EVALUATION_BATCH = 32
PREFETCHED_BATCHES = 4
# The share of free memory that the decoded images may take.
MAX_MEMORY_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The manifest's rows for training and for validation, which may be empty."""

    train: pd.DataFrame
    validation: pd.DataFrame


def split_training(manifest: Manifest, recipe: Recipe) -> Splits:
    """Carve validation out of the images that are not test, by the manifest's split seed."""
    rows = manifest.rows("train").reset_index(drop=True)
    held_out = hold_out(rows, manifest.summary.split, recipe.validation_fraction, "validation")
    if recipe.solved:
        # every image is validated out of fold, and trained on
        return Splits(train=rows, validation=rows if held_out.any() else rows[:0])
    train = rows[~held_out].reset_index(drop=True)
    check_batch(len(train), recipe)
    return Splits(train=train, validation=rows[held_out].reset_index(drop=True))


def check_batch(images: int, recipe: Recipe) -> None:
    """Raise a UserError if there are fewer training images than a batch has."""
    if images < recipe.batch_size:
        fits = 1 << max(0, images.bit_length() - 1)
        raise UserError(
            f"batch_size {recipe.batch_size} is more than the {images} training images: use"
            f" --batch-size {fits} or fewer, or more images"
        )


def count_steps(images: int, recipe: Recipe) -> int:
    """Count the whole batches of an epoch. The images that remain, others in each epoch, are left
    out: an uneven batch would weigh images differently on several devices.
    """
    return images // recipe.batch_size


# A loader turns a data set of row numbers into batches of (images, row numbers):
# (batch, size, size, 3) uint8 and (batch,) int64. The last argument drops a short last batch.
Loader = Callable[[tf.data.Dataset, int, bool], tf.data.Dataset]


def build_stream_loader(manifest: Manifest, rows: pd.DataFrame, recipe: Recipe) -> Loader:
    """Build a loader that decodes each image from its file when it is needed, in parallel."""
    decode_row = build_decoder(manifest, rows, recipe)

    def load(indices: tf.data.Dataset, batch_size: int, drop: bool) -> tf.data.Dataset:
        images = indices.map(decode_row, num_parallel_calls=available_cpus())
        return images.batch(batch_size, drop_remainder=drop)

    return load


def build_memory_loader(manifest: Manifest, rows: pd.DataFrame, recipe: Recipe) -> Loader:
    """Build a loader that decodes every image once into one array and picks from it."""
    return _pick_from(read_images(manifest, rows, recipe))


def _pick_from(inputs: tf.Tensor) -> Loader:
    return _pick_by(lambda batch: tf.gather(inputs, batch))


def _pick_by(pick: Callable[[Any], Any]) -> Loader:
    def load(indices: tf.data.Dataset, batch_size: int, drop: bool) -> tf.data.Dataset:
        batches = indices.batch(batch_size, drop_remainder=drop)
        return batches.map(lambda batch: (pick(batch), batch))

    return load


LOADERS: dict[str, Callable[[Manifest, pd.DataFrame, Recipe], Loader]] = {
    "memory": build_memory_loader,
    "stream": build_stream_loader,
}


def build_decoder(
    manifest: Manifest, rows: pd.DataFrame, recipe: Recipe
) -> Callable[[Any], tuple[Any, Any]]:
    """Build the graph function from a row number to (image, row number)."""
    # joined as bytes: a million Paths would take three seconds
    root = os.path.join(os.fsencode(manifest.root), b"")
    paths = tf.constant([root + os.fsencode(path) for path in rows["path"].tolist()])
    plain = tf.constant(rows["plain_jpeg"].to_numpy(dtype=bool))
    all_plain = bool(rows["plain_jpeg"].all())

    def decode_row(index: Any) -> tuple[Any, Any]:
        is_plain = True if all_plain else tf.gather(plain, index)
        path = tf.gather(paths, index)
        return decode_in_graph(path, is_plain, recipe.resize, recipe.image_size), index

    return decode_row


def read_images(manifest: Manifest, rows: pd.DataFrame, recipe: Recipe) -> tf.Tensor:
    """Read every row's image into one (rows, size, size, 3) uint8 tensor in RAM."""
    size = recipe.image_size
    check_memory(len(rows), size)
    images = np.empty((len(rows), size, size, 3), np.uint8)
    load = build_stream_loader(manifest, rows, recipe)
    batches = load(tf.data.Dataset.range(len(rows)), EVALUATION_BATCH, False)
    with progress("decoding into memory", len(rows)) as advance:
        for batch, indices in prefetch(batches).as_numpy_iterator():
            images[indices] = batch
            advance(len(batch))
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(images)


def check_memory(images: int, size: int) -> None:
    """Raise a UserError if so many decoded images do not fit the free memory."""
    what = f"loader memory needs {{}} for {images:,} images at {size} px"
    # the array and the tensor exist side by side for a moment
    _check_free_memory(2 * images * size * size * 3, what, "use --loader stream")


def check_feature_memory(images: int, views: int, size: int) -> None:
    """Raise a UserError if features of `size` bytes for each view do not fit the free memory."""
    what = f"loader features needs {{}} for {images:,} images in {views} views"
    _check_free_memory(images * views * size, what, "take fewer --feature-views")


def fits_memory(needed: int) -> bool:
    """Return whether `needed` bytes are not too much of the free memory."""
    return needed <= MAX_MEMORY_SHARE * free_memory()


def _check_free_memory(needed: int, what: str, instead: str) -> None:
    """Raise a UserError if `needed` bytes are too much of the free memory."""
    free = free_memory()
    if needed > MAX_MEMORY_SHARE * free:
        needs = what.format(format_bytes(needed, math.ceil))
        may = format_bytes(MAX_MEMORY_SHARE * free, math.floor)
        raise UserError(f"{needs}, but may use {may} of {format_bytes(free)} free: {instead}")


def shuffled_indices(count: int, kept: int, recipe: Recipe, first_epoch: int) -> tf.data.Dataset:
    """Yield `kept` of `count` row numbers, shuffled, for each epoch from `first_epoch` on."""

    def one_epoch(epoch: Any) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(count, dtype=tf.int64), seed=tf.stack([recipe.seed, epoch])
        )
        return tf.data.Dataset.from_tensor_slices(order[:kept])

    return tf.data.Dataset.range(first_epoch, recipe.epochs).flat_map(one_epoch)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of some rows: images, or features instead of them.

    `load` yields batches of inputs; `change(batch, indices, seed)` makes them training inputs by
    augmentation, or by choosing a view.
    """

    load: Loader
    change: Callable[[Any, Any, Any], Any] = lambda batch, indices, seed: batch


def image_inputs(manifest: Manifest, rows: pd.DataFrame, recipe: Recipe, size: int) -> Inputs:
    """Build inputs of images decoded to (batch, size, size, 3) uint8; training changes them to the
    recipe's image size, float32 with augmentation.
    """
    augment = AUGMENTATIONS[recipe.augmentation]
    return Inputs(
        load=LOADERS[recipe.loader](manifest, rows, recipe.at_size(size)),
        change=lambda images, indices, seed: augment(images, seed, recipe),
    )


def feature_inputs(features: Features | PickedFeatures) -> Inputs:
    """Build (batch, ...) float32 inputs of features from a (views, rows, ...) array of floats,
    which may lie on disk.

    In training, each row comes each time as one of its views at random; else as the first view.
    """
    views, _, *shape = features.shape

    def read(view: Any, rows: Any) -> Any:
        return features[view, rows].astype(np.float32)

    def pick(rows: Any, view: Any = 0) -> Any:
        # by NumPy, since a tensor would be another copy of gigabytes
        found = tf.numpy_function(read, (view, rows), tf.float32, stateful=False)
        return tf.ensure_shape(found, (*rows.shape, *shape))

    def choose_view(inputs: Any, indices: Any, seed: Any) -> Any:
        drawn = tf.random.stateless_uniform(tf.shape(indices), seed, 0, views, tf.int64)
        return pick(indices, drawn)

    return Inputs(load=_pick_by(pick), change=choose_view)


def build_training_dataset(
    inputs: Inputs, manifest: Manifest, rows: pd.DataFrame, recipe: Recipe, first_epoch: int = 0
) -> tf.data.Dataset:
    """Build the (inputs, labels) batches of all epochs that are left, as one data set.

    Labels are encoded for the recipe's loss. An epoch is `count_steps` batches.
    """
    steps = count_steps(len(rows), recipe)
    encode, mix = build_label_encoder(manifest, rows, recipe), MIXINGS[recipe.mixing]

    def finish(step: Any, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        found, indices = batch
        seed = tf.stack([tf.cast(recipe.seed, tf.int64), step])
        return mix(inputs.change(found, indices, seed), encode(indices), seed)

    indices = shuffled_indices(len(rows), steps * recipe.batch_size, recipe, first_epoch)
    batches = inputs.load(indices, recipe.batch_size, True).enumerate(first_epoch * steps)
    return prefetch(batches.map(finish, num_parallel_calls=available_cpus()))


def build_validation_dataset(
    inputs: Inputs, manifest: Manifest, rows: pd.DataFrame, recipe: Recipe, replicas: int = 1
) -> tf.data.Dataset | None:
    """Build (inputs, labels) batches of every row once, in order, never augmented; each has work
    for every replica. None for no rows.
    """
    if rows.empty:
        return None
    encode = build_label_encoder(manifest, rows, recipe)
    size, last = size_evaluation_batches(len(rows), recipe.batch_size, replicas)
    batches = inputs.load(tf.data.Dataset.range(len(rows) - last), size, False)
    if last:
        tail = tf.data.Dataset.range(len(rows) - last, len(rows))
        batches = batches.concatenate(inputs.load(tail, last, False))
    return prefetch(batches.map(lambda found, indices: (found, encode(indices))))


def size_evaluation_batches(images: int, batch_size: int, replicas: int) -> tuple[int, int]:
    """Return the size of the batches, and of a last one that is larger or smaller, or 0.

    TensorFlow splits each batch into equal parts, one for each replica. An empty part crashes it,
    and so does a first batch with uneven parts. So whole batches divide evenly, and a remainder
    that is too small for every replica to get an image joins the batch before it.
    """

    def reaches_all(batch: int) -> bool:
        return batch > (replicas - 1) * -(-batch // replicas)

    for size in range(batch_size - batch_size % replicas, 0, -replicas):
        last = images % size
        if last and not reaches_all(last):
            last += size
        if last + (size if last else 0) <= images and (not last or reaches_all(last)):
            return size, last
    raise UserError(
        f"{images} validation images cannot be split over {replicas} devices: change --batch-size"
        " or --validation-fraction"
    )


def weigh_classes(rows: pd.DataFrame, recipe: Recipe, classes: int) -> dict[int, float] | None:
    """Return the weight in the loss of each class, by label id: 1 on average over the images; None
    if all weigh the same.
    """
    if recipe.class_weight == "none":
        return None
    counts = rows["label_id"].value_counts()
    return {
        label: float(len(rows) / (len(counts) * counts.get(label, 1))) for label in range(classes)
    }


def build_label_encoder(
    manifest: Manifest, rows: pd.DataFrame, recipe: Recipe
) -> Callable[[Any], Any]:
    """Build the function from row numbers to what the loss needs: label ids, or one-hot rows."""
    label_ids = tf.constant(rows["label_id"].to_numpy(), tf.int32)
    classes = len(manifest.class_names)
    return {
        "sparse_categorical_crossentropy": lambda batch: tf.gather(label_ids, batch),
        "categorical_crossentropy": lambda batch: tf.one_hot(tf.gather(label_ids, batch), classes),
    }[recipe.loss]


def prefetch(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Compute batches ahead of time, without TensorFlow's autotuning.

    Autotuning works in rounds that double up to a minute, and freeing an iterator waits for the end
    of its round (TensorFlow 2.21): seconds after each validation, a minute after training.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    # the batches do not know which file an image is from
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.prefetch(PREFETCHED_BATCHES).with_options(options)
