"""The model that is logged: float32 on one device, for images of one size, with what it does beside
the training's model.
"""

from dataclasses import replace

import keras
from keras import layers, ops

from har.models.backbones import copy_weights
from har.models.build import build_model
from har.recipe import Recipe

# Of what a logarithm is taken: float32 rounds smaller ones to 0.
SMALLEST_PROBABILITY = 1e-30


def build_served(model: keras.Model, recipe: Recipe, temperature: float) -> keras.Model:
    """Build what is logged: `model`, averaged over an image and its mirror image if the recipe says
    so, its probabilities scaled by a temperature (above 1: less sure; 1: not scaled).
    """
    if recipe.test_time == "none" and temperature == 1:
        return model
    # the same layers without the optimizer, which would be saved with them
    model = keras.Model(model.input, model.output)
    images = layers.Input(model.input_shape[1:], name="image")
    if recipe.test_time == "mirror":
        both = ops.concatenate([images, ops.flip(images, axis=2)], axis=0)
        pairs = ops.reshape(model(both), (2, -1, model.output_shape[-1]))
        probabilities = ops.mean(pairs, axis=0)
    else:
        probabilities = model(images)
    if temperature != 1:
        logits = layers.Rescaling(1 / temperature, name="temperature")(
            ops.log(ops.maximum(probabilities, SMALLEST_PROBABILITY))
        )
        probabilities = layers.Softmax(name="calibrated")(logits)
    return keras.Model(images, probabilities)


def build_float32_copy(model: keras.Model, recipe: Recipe, num_classes: int) -> keras.Model:
    """Copy a trained model to float32 on one device, at the size that is served."""
    # random weights: those of `model` replace them, so none are downloaded or read
    plain = replace(recipe.at_size(recipe.served_size), precision="float32", weights="random")
    copy = build_model(plain, num_classes)
    copy_weights(model, copy)
    return copy
