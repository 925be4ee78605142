"""Recipe to compiled Keras model: backbone, head, loss, metrics."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import keras
from keras import layers, ops

from har.models.backbones import build_backbone, find_cut
from har.models.devices import precision_policy
from har.recipe import Recipe


def flatten_dense512(features: Any) -> Any:
    """Add Flatten and Dense(512, relu), as original and v1; pooled features are flat already."""
    x = layers.Flatten()(features)
    return layers.Dense(512, activation="relu")(x)


def gap_dropout(features: Any) -> Any:
    """Add Dropout(0.2), as v2 to v4; their GlobalAveragePooling2D is part of every backbone."""
    return layers.Dropout(0.2)(features)


def signed_root(features: Any) -> Any:
    """Take the square root of each feature's size: a few large ones would outweigh the others.

    ("Power normalisation", Perronnin et al., 2010.) `har.training.probe` solves for the output
    layer behind it.
    """
    return ops.sign(features) * ops.sqrt(ops.abs(features))


HEADS: dict[str, Callable[[Any], Any]] = {
    "flatten_dense512": flatten_dense512,
    "gap_dropout": gap_dropout,
    "linear_probe": signed_root,
}


def build_cosine(recipe: Recipe, steps: int) -> Any:
    """Build a rate that rises from 0 during the warm-up, then falls to 0 along a cosine."""
    warmup = round(recipe.warmup_epochs * steps)
    start = {"initial_learning_rate": 0.0, "warmup_target": recipe.learning_rate}
    return keras.optimizers.schedules.CosineDecay(
        **(start if warmup else {"initial_learning_rate": recipe.learning_rate}),
        warmup_steps=warmup,
        decay_steps=max(1, recipe.epochs * steps - warmup),
    )


# From the recipe and the steps of an epoch to a learning rate.
SCHEDULES: dict[str, Callable[[Recipe, int], Any]] = {
    "constant": lambda recipe, steps: recipe.learning_rate,
    "cosine": build_cosine,
}


def build_adamw(recipe: Recipe, **options: Any) -> keras.Optimizer:
    """Build Adam with decoupled weight decay, which leaves biases alone."""
    optimizer = keras.optimizers.AdamW(weight_decay=recipe.weight_decay, **options)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


OPTIMIZERS: dict[str, Callable[..., keras.Optimizer]] = {
    "adam": lambda recipe, **options: keras.optimizers.Adam(**options),
    "adamw": build_adamw,
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


def build_model(
    recipe: Recipe, num_classes: int, steps: int = 1, backbone: keras.Model | None = None
) -> keras.Model:
    """Build and compile (batch, size, size, 3) of 0..255 to (batch, classes) probabilities; an
    epoch has `steps` steps. A recipe of two sizes gets a model that takes any size. `backbone` is
    the recipe's, if it was built before.

    Batch normalisation in the backbone always uses its stored statistics. Stochastic depth, in
    the backbones of keras.applications, is active in `fit`, as in the notebooks, even if frozen.
    """
    with precision_policy(recipe.precision):
        backbone = backbone or build_backbone(recipe)
        inputs = layers.Input(backbone.input_shape[1:], name="image")
        model = keras.Model(inputs, _apply_head(backbone(inputs), recipe, num_classes))
    compile_model(model, recipe, steps=steps)
    return model


def _apply_head(features: Any, recipe: Recipe, num_classes: int) -> Any:
    x = HEADS[recipe.head](features)
    # softmax over 16-bit logits loses small probabilities
    return layers.Dense(num_classes, activation="softmax", dtype="float32", name="label")(x)


def compile_model(
    model: keras.Model, recipe: Recipe, steps_per_execution: int = 1, steps: int = 1
) -> None:
    """Compile with the recipe's optimizer, its loss, and its metrics accuracy and top_3_accuracy;
    an epoch has `steps` steps.
    """
    loss: Any = recipe.loss
    if recipe.label_smoothing:
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
    model.compile(
        optimizer=_build_optimizer(recipe, steps),
        loss=loss,
        metrics=LOSSES[recipe.loss](),
        steps_per_execution=steps_per_execution,
    )


def _build_optimizer(recipe: Recipe, steps: int) -> keras.Optimizer:
    options: dict[str, Any] = {"learning_rate": SCHEDULES[recipe.schedule](recipe, steps)}
    if recipe.global_clipnorm:
        options["global_clipnorm"] = recipe.global_clipnorm
    if recipe.ema_momentum:
        options |= {"use_ema": True, "ema_momentum": recipe.ema_momentum}
    return OPTIMIZERS[recipe.optimizer](recipe, **options)


def build_head(
    recipe: Recipe,
    num_features: int,
    num_classes: int,
    steps_per_execution: int = 1,
    steps: int = 1,
) -> keras.Model:
    """Build and compile only the layers after the backbone: (batch, features) to probabilities."""
    with precision_policy(recipe.precision):
        inputs = layers.Input((num_features,), name="features")
        head = keras.Model(inputs, _apply_head(inputs, recipe, num_classes))
    compile_model(head, recipe, steps_per_execution, steps)
    return head


def set_output_layer(model: keras.Model, kernel: Any, bias: Any) -> None:
    """Set the weights of the layer that gives the probabilities."""
    model.get_layer("label").set_weights([kernel, bias])


def split_backbone(model: keras.Model, recipe: Recipe) -> tuple[keras.Model, keras.Model]:
    """Return the backbone's layers before the cut, and those after it, as two networks that share
    them: images to (batch, height, width, channels), and on to (batch, features).
    """
    network = find_backbone(model)
    cut = find_cut(network, recipe)
    return keras.Model(network.input, cut), keras.Model(cut, network.output)


def build_last_blocks(model: keras.Model, recipe: Recipe, steps: int) -> keras.Model:
    """Build and compile the part of `model` after the cut, which shares its weights: the output of
    the layers before the cut to probabilities.
    """
    _, after = split_backbone(model, recipe)
    x = inputs = layers.Input(after.input_shape[1:], name="features")
    for layer in [after, *_find_head(model)]:
        x = layer(x)
    learner = keras.Model(inputs, x)
    compile_model(learner, recipe, steps=steps)
    return learner


def _find_head(model: keras.Model) -> list[Any]:
    return list(model.layers[model.layers.index(find_backbone(model)) + 1 :])


def find_backbone(model: keras.Model) -> keras.Model:
    """Return the backbone: the layer after the input. A head may contain networks too."""
    return next(layer for layer in model.layers if not isinstance(layer, layers.InputLayer))


def copy_head(model: keras.Model, head: keras.Model, *, back: bool = False) -> None:
    """Copy the weights after the backbone from `model` to `head`; with `back`, the other way."""
    inner = _find_head(model)
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
