"""Recipe to compiled Keras model: backbone, head, loss, metrics."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
from keras import layers

from har.backbones import build_backbone, copy_weights
from har.devices import precision_policy
from har.recipe import Recipe


def flatten_dense512(features: Any) -> Any:
    """Original and v1: Flatten (nothing to do on pooled features), Dense(512, relu)."""
    x = layers.Flatten()(features)
    return layers.Dense(512, activation="relu")(x)


def gap_dropout(features: Any) -> Any:
    """v2 to v4: GlobalAveragePooling2D (already part of every backbone here), Dropout(0.2)."""
    return layers.Dropout(0.2)(features)


HEADS: dict[str, Callable[[Any], Any]] = {
    "flatten_dense512": flatten_dense512,
    "gap_dropout": gap_dropout,
}

# Both metrics of each loss are named alike, so that histories of all variants compare.
LOSSES: dict[str, Callable[[], list[keras.metrics.Metric]]] = {
    "categorical_crossentropy": lambda: [
        keras.metrics.CategoricalAccuracy(name="accuracy"),
        keras.metrics.TopKCategoricalAccuracy(k=3, name="top_3_accuracy"),
    ],
    "sparse_categorical_crossentropy": lambda: [
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        keras.metrics.SparseTopKCategoricalAccuracy(k=3, name="top_3_accuracy"),
    ],
}


def build_model(recipe: Recipe, num_classes: int) -> keras.Model:
    """(batch, size, size, 3) of 0..255 to (batch, classes) float32 probabilities, compiled.

    The backbone's batch normalisation always uses the stored statistics. Its stochastic
    depth, where keras.applications has it, is active in `fit`, frozen or not, as in the
    notebooks.

    Raises:
        UserError: the backbone's weights cannot be had.
    """
    with precision_policy(recipe.precision):
        backbone = build_backbone(recipe)
        inputs = layers.Input((recipe.image_size, recipe.image_size, 3), name="image")
        x = HEADS[recipe.head](backbone(inputs))
        # softmax over 16-bit logits loses the small probabilities
        outputs = layers.Dense(num_classes, activation="softmax", dtype="float32", name="label")(x)
        model = keras.Model(inputs, outputs)
    model.compile(
        optimizer=keras.optimizers.Adam(recipe.learning_rate),
        loss=recipe.loss,
        metrics=LOSSES[recipe.loss](),
    )
    return model


def build_float32_copy(model: keras.Model, recipe: Recipe, num_classes: int) -> keras.Model:
    """The same network and weights in float32 on one device: what is judged and served."""
    # the weights come from `model`: no need to read the backbone's again
    copy = build_model(replace(recipe, precision="float32", weights="random"), num_classes)
    copy_weights(model, copy)
    return copy
