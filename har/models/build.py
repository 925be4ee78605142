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
        model = keras.Model(inputs, _apply_head(backbone(inputs), recipe, num_classes))
    compile_model(model, recipe)
    return model


def _apply_head(features: Any, recipe: Recipe, num_classes: int) -> Any:
    """The head and the output layer on (batch, features)."""
    x = HEADS[recipe.head](features)
    # softmax over 16-bit logits loses the small probabilities
    return layers.Dense(num_classes, activation="softmax", dtype="float32", name="label")(x)


def compile_model(model: keras.Model, recipe: Recipe, steps_per_execution: int = 1) -> None:
    """Adam, the recipe's loss, and both metrics."""
    model.compile(
        optimizer=keras.optimizers.Adam(recipe.learning_rate),
        loss=recipe.loss,
        metrics=LOSSES[recipe.loss](),
        steps_per_execution=steps_per_execution,
    )


def build_head(
    recipe: Recipe, num_features: int, num_classes: int, steps_per_execution: int = 1
) -> keras.Model:
    """The part of `build_model` behind the backbone by itself, compiled: (batch, features)
    float32 to (batch, classes) float32 probabilities.
    """
    with precision_policy(recipe.precision):
        inputs = layers.Input((num_features,), name="features")
        head = keras.Model(inputs, _apply_head(inputs, recipe, num_classes))
    compile_model(head, recipe, steps_per_execution)
    return head


def find_backbone(model: keras.Model) -> keras.Model:
    """The backbone inside what `build_model` returns: the layer behind its input. A head may hold
    networks too.
    """
    return next(layer for layer in model.layers if not isinstance(layer, layers.InputLayer))


def copy_head(model: keras.Model, head: keras.Model, *, back: bool = False) -> None:
    """The weights behind the backbone from `model` into `head`; `back`: the other way round."""
    inner = model.layers[model.layers.index(find_backbone(model)) + 1 :]
    outer = [layer for layer in head.layers if not isinstance(layer, layers.InputLayer)]
    for one, other in zip(inner, outer, strict=True):
        source, target = (other, one) if back else (one, other)
        target.set_weights(source.get_weights())


def build_trained_head(model: keras.Model, recipe: Recipe) -> keras.Model:
    """What is behind the backbone of a float32 model, by itself."""
    num_features, num_classes = find_backbone(model).output_shape[-1], model.output_shape[-1]
    head = build_head(replace(recipe, precision="float32"), num_features, num_classes)
    copy_head(model, head)
    return head


def build_float32_copy(model: keras.Model, recipe: Recipe, num_classes: int) -> keras.Model:
    """The same network and weights in float32 on one device: what is evaluated and served."""
    # the weights come from `model`: no need to read the backbone's again
    copy = build_model(replace(recipe, precision="float32", weights="random"), num_classes)
    copy_weights(model, copy)
    return copy
