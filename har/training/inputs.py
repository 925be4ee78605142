"""What a training is fed with: the part of the model that is trained, and its data."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import keras

from har.models.backbones import (
    build_backbone,
    check_cut,
    check_weights_reader,
    copy_weights,
    name_cut,
)
from har.models.build import (
    build_head,
    build_last_blocks,
    build_model,
    copy_head,
    find_backbone,
    set_output_layer,
    split_backbone,
)
from har.models.devices import STRATEGIES, precision_policy
from har.training.features import FeatureSplits, View, extract_splits
from har.training.frozen import FrozenFeatures
from har.training.job import TrainingJob
from har.training.loaders import (
    Splits,
    build_training_dataset,
    build_validation_dataset,
    check_memory,
    count_steps,
    feature_inputs,
    image_inputs,
    size_evaluation_batches,
    split_training,
)
from har.training.probe import DEFAULT_C
from har.training.ray_features import open_extraction
from har.training.regression import fit_layers
from har.training.suspects import check_cleanlab
from har.util.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FitInputs:
    """The model that `fit` trains and its data; `model` is the whole model that it is part of."""

    learner: keras.Model
    model: keras.Model
    train_data: Any
    validation_data: Any
    features: FeatureSplits | None = None


def build_image_inputs(job: TrainingJob, splits: Splits, first_epoch: int) -> FitInputs:
    """Train the whole model on every image in every epoch, as the notebooks do."""
    recipe, manifest, strategy = job.used, job.manifest, STRATEGIES[job.used.strategy]()
    replicas = strategy.num_replicas_in_sync
    train, validation, validation_data = splits.train, splits.validation, None
    inputs = image_inputs(manifest, train, recipe, recipe.source_size)
    train_data = build_training_dataset(inputs, manifest, train, recipe, first_epoch)
    if not validation.empty:
        inputs = image_inputs(manifest, validation, recipe, recipe.served_size)
        validation_data = build_validation_dataset(inputs, manifest, validation, recipe, replicas)
    with strategy.scope():
        model = build_model(recipe, len(manifest.class_names), count_steps(len(train), recipe))
    _start_head(model, job, train)
    return FitInputs(
        learner=model, model=model, train_data=train_data, validation_data=validation_data
    )


def _start_head(model: keras.Model, job: TrainingJob, train: Any) -> None:
    """Set the output layer to the one solved for on the training images' features, if the recipe
    starts from it.
    """
    recipe, classes = job.used, len(job.manifest.class_names)
    if recipe.head_start != "linear_probe":
        return
    backbone = find_backbone(model)
    if recipe.precision != "float32" or job.replicas > 1:
        # the same in float32, on one device
        with precision_policy("float32"):
            plain = build_backbone(replace(recipe, weights="random"))
        copy_weights(backbone, plain)
        backbone = plain
    with open_extraction(job, backbone) as extraction:
        features = extraction.features(train, View(size=recipe.image_size))
    labels = train["label_id"].to_numpy()
    (layer,) = fit_layers(features[None], labels, classes, [DEFAULT_C], recipe)
    set_output_layer(model, layer.kernel, layer.bias)


def build_feature_inputs(
    job: TrainingJob, splits: Splits, first_epoch: int, kept: FrozenFeatures
) -> FitInputs:
    """Compute features by the frozen backbone once, then train the head on them.

    The head starts from the weights that it would have in the whole model, and sees the same
    images in the same order.
    """
    recipe, manifest, strategy = job.used, job.manifest, STRATEGIES[job.used.strategy]()
    replicas, classes = strategy.num_replicas_in_sync, len(manifest.class_names)
    backbone, found = kept.compute(job, splits)
    model = build_model(replace(recipe, precision="float32"), classes, backbone=backbone)
    _start_head(model, job, splits.train)
    # one replica needs no strategy, which would cost more than a step of so small a model
    with strategy.scope() if replicas > 1 else nullcontext():
        # one execution runs all steps of an epoch; on several devices Keras 3.15 cannot
        steps = count_steps(len(splits.train), recipe)
        at_once = steps if replicas == 1 else 1
        head = build_head(recipe, found.train.shape[-1], classes, max(1, at_once), steps)
    copy_head(model, head)
    return FitInputs(
        learner=head,
        model=model,
        train_data=_build_training_data(job, splits, found, first_epoch),
        validation_data=_build_validation_data(job, splits, found),
        features=found,
    )


def _build_training_data(
    job: TrainingJob, splits: Splits, found: FeatureSplits, first_epoch: int
) -> Any:
    inputs = feature_inputs(found.train)
    return build_training_dataset(inputs, job.manifest, splits.train, job.used, first_epoch)


def _build_validation_data(job: TrainingJob, splits: Splits, found: FeatureSplits) -> Any:
    inputs = feature_inputs(found.validation[:1])
    return build_validation_dataset(inputs, job.manifest, splits.validation, job.used, job.replicas)


def build_last_block_inputs(job: TrainingJob, splits: Splits, first_epoch: int) -> FitInputs:
    """Compute the output of the blocks before the cut once, for each view of each image, then train
    the blocks after it and the head.
    """
    recipe, manifest, strategy = job.used, job.manifest, STRATEGIES[job.used.strategy]()
    replicas, classes = strategy.num_replicas_in_sync, len(manifest.class_names)
    model = build_model(replace(recipe, precision="float32"), classes)
    before, _ = split_backbone(model, recipe)
    cut = name_cut(recipe)
    with open_extraction(job, before, cut) as extraction:
        found = extract_splits(extraction, splits)
    _start_head(model, job, splits.train)
    steps = count_steps(len(splits.train), recipe)
    with strategy.scope() if replicas > 1 else nullcontext():
        if replicas > 1 or recipe.precision != "float32":
            model, exact = build_model(replace(recipe, weights="random"), classes), model
            copy_weights(exact, model)
        learner = build_last_blocks(model, recipe, steps)
    return FitInputs(
        learner=learner,
        model=model,
        train_data=_build_training_data(job, splits, found, first_epoch),
        validation_data=_build_validation_data(job, splits, found),
        # the data set holds those of training, which may be gigabytes
        features=replace(found, train=found.train[:, :0].copy()),
    )


def build_inputs(
    job: TrainingJob, splits: Splits, first_epoch: int, kept: FrozenFeatures | None = None
) -> FitInputs:
    """Build what the recipe's loader feeds to the part of the model that is trained; `kept` are
    frozen features of earlier trainings in this process.
    """
    return FIT_INPUTS[job.used.loader](job, splits, first_epoch, kept or FrozenFeatures())


def _build_on_features(
    job: TrainingJob, splits: Splits, first_epoch: int, kept: FrozenFeatures
) -> FitInputs:
    if job.used.fine_tune == "last_blocks":
        return build_last_block_inputs(job, splits, first_epoch)
    return build_feature_inputs(job, splits, first_epoch, kept)


def _build_on_images(
    job: TrainingJob, splits: Splits, first_epoch: int, kept: FrozenFeatures
) -> FitInputs:
    return build_image_inputs(job, splits, first_epoch)


# One entry for each value of the recipe's axis `loader`.
FIT_INPUTS: dict[str, Callable[[TrainingJob, Splits, int, FrozenFeatures], FitInputs]] = {
    "memory": _build_on_images,
    "stream": _build_on_images,
    "features": _build_on_features,
}


def split_job(job: TrainingJob) -> Splits:
    """Split a job's images into training and validation.

    Raises:
        UserError: an unknown cut, cleanlab or KerasHub is missing, too few images, a batch that
            does not divide evenly over the devices, or images that do not fit the memory.
    """
    recipe = job.used
    check_cut(recipe)
    check_weights_reader(recipe)
    if recipe.suspects == "leave_out":
        check_cleanlab()
    splits = split_training(job.manifest, recipe)
    if recipe.batch_size % job.replicas:
        fits = recipe.batch_size // job.replicas * job.replicas or job.replicas
        raise UserError(
            f"batch_size {recipe.batch_size} does not divide evenly over {job.replicas} devices:"
            f" try --batch-size {fits}"
        )
    if not splits.validation.empty:
        size_evaluation_batches(len(splits.validation), recipe.batch_size, job.replicas)
    if recipe.loader == "memory":
        images = len(splits.train) + len(splits.validation)
        check_memory(images, max(recipe.source_size, recipe.served_size))
    return splits
