"""Recipe to compiled Keras model: backbone, head, loss, metrics."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
from keras import layers

from har.models.backbones import build_backbone, copy_weights
from har.models.devices import precision_policy
from har.recipe import Recipe


def flatten_dense512(features: Any) -> Any:
    """Add Flatten and Dense(512, relu), as original and v1; pooled features are flat already."""
    x = layers.Flatten()(features)
    return layers.Dense(512, activation="relu")(x)


def gap_dropout(features: Any) -> Any:
    """Add Dropout(0.2), as v2 to v4; their GlobalAveragePooling2D is part of every backbone."""
    return layers.Dropout(0.2)(features)


HEADS: dict[str, Callable[[Any], Any]] = {
    "flatten_dense512": flatten_dense512,
    "gap_dropout": gap_dropout,
}
# The metrics of each loss have the same names, so that the histories of all variants compare.
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
    """Build and compile (batch, size, size, 3) of 0..255 to (batch, classes) probabilities.

    Batch normalisation in the backbone always uses its stored statistics. Stochastic depth, in
    the backbones of keras.applications, is active in `fit`, as in the notebooks, even if frozen.
    """
    with precision_policy(recipe.precision):
        backbone = build_backbone(recipe)
        inputs = layers.Input((recipe.image_size, recipe.image_size, 3), name="image")
        model = keras.Model(inputs, _apply_head(backbone(inputs), recipe, num_classes))
    compile_model(model, recipe)
    return model


def _apply_head(features: Any, recipe: Recipe, num_classes: int) -> Any:
    x = HEADS[recipe.head](features)
    # softmax over 16-bit logits loses small probabilities
    return layers.Dense(num_classes, activation="softmax", dtype="float32", name="label")(x)


def compile_model(model: keras.Model, recipe: Recipe, steps_per_execution: int = 1) -> None:
    """Compile with Adam, the recipe's loss, and its metrics accuracy and top_3_accuracy."""
    model.compile(
        optimizer=keras.optimizers.Adam(recipe.learning_rate),
        loss=recipe.loss,
        metrics=LOSSES[recipe.loss](),
        steps_per_execution=steps_per_execution,
    )


def build_head(
    recipe: Recipe, num_features: int, num_classes: int, steps_per_execution: int = 1
) -> keras.Model:
    """Build and compile only the layers after the backbone: (batch, features) to probabilities."""
    with precision_policy(recipe.precision):
        inputs = layers.Input((num_features,), name="features")
        head = keras.Model(inputs, _apply_head(inputs, recipe, num_classes))
    compile_model(head, recipe, steps_per_execution)
    return head


def find_backbone(model: keras.Model) -> keras.Model:
    """Return the backbone: the layer after the input. A head may contain networks too."""
    return next(layer for layer in model.layers if not isinstance(layer, layers.InputLayer))


def copy_head(model: keras.Model, head: keras.Model, *, back: bool = False) -> None:
    """Copy the weights after the backbone from `model` to `head`; with `back`, the other way."""
    inner = model.layers[model.layers.index(find_backbone(model)) + 1 :]
    outer = [layer for layer in head.layers if not isinstance(layer, layers.InputLayer)]
    for one, other in zip(inner, outer, strict=True):
        source, target = (other, one) if back else (one, other)
        target.set_weights(source.get_weights())


def build_trained_head(model: keras.Model, recipe: Recipe) -> keras.Model:
    """Build a head with the trained weights of a float32 `model`."""
    num_features, num_classes = find_backbone(model).output_shape[-1], model.output_shape[-1]
    head = build_head(replace(recipe, precision="float32"), num_features, num_classes)
    copy_head(model, head)
    return head


def build_float32_copy(model: keras.Model, recipe: Recipe, num_classes: int) -> keras.Model:
    """Copy a trained model to float32 on one device, to evaluate and serve it."""
    # random weights: those of `model` replace them, so none are downloaded or read
    copy = build_model(replace(recipe, precision="float32", weights="random"), num_classes)
    copy_weights(model, copy)
    return copy
