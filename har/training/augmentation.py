"""Random changes to a batch of training images or labels, as functions of a seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from har.recipe import Recipe

AUGMENT_ROTATION_TURNS = 0.1
AUGMENT_ZOOM = 0.1
AUGMENT_CONTRAST = 0.1
# The widest and the tallest crop have these ratios of width to height (torchvision's choice).
CROP_RATIO = 4 / 3
CROP_BRIGHTNESS = CROP_CONTRAST = 0.2
# Both parameters of the beta distribution that mixup draws shares from (mixup paper: 0.1 to 0.4).
MIXUP_ALPHA = 0.2


def augment(images: Any, seed: Any, recipe: Recipe) -> Any:
    """Flip, rotate, zoom and change the contrast of each image of a batch.

    Maps (batch, height, width, 3) of 0..255 to the same in float32. `seed` is a pair of integers;
    equal seeds give equal images. Corners that become empty are filled by reflection.
    """
    count = tf.shape(images)[0]
    draw = tf.random.stateless_uniform((4, count), seed, minval=-1.0, maxval=1.0)
    mirror = tf.where(draw[0] < 0, -1.0, 1.0)
    angle = draw[1] * (AUGMENT_ROTATION_TURNS * 2 * np.pi)
    images = rotate_and_zoom(tf.cast(images, tf.float32), angle, 1 + draw[2] * AUGMENT_ZOOM, mirror)
    return change_contrast(images, 1 + draw[3] * AUGMENT_CONTRAST)


def rotate_and_zoom(images: Any, angle: Any, zoom: Any, mirror: Any) -> Any:
    """Resample once, bilinearly, about the centre.

    `angle`, `zoom` and `mirror` are (batch,): radians counter-clockwise; above 1 shows more of the
    scene; -1 flips left-right.
    """
    shape = tf.shape(images)
    x_centre = tf.cast(shape[2] - 1, tf.float32) / 2
    y_centre = tf.cast(shape[1] - 1, tf.float32) / 2
    cos, sin = tf.cos(angle) * zoom, tf.sin(angle) * zoom
    a, b, c, d = cos * mirror, -sin * mirror, sin, cos
    transforms = tf.stack(
        [
            a,
            b,
            x_centre - a * x_centre - b * y_centre,
            c,
            d,
            y_centre - c * x_centre - d * y_centre,
            tf.zeros_like(a),
            tf.zeros_like(a),
        ],
        axis=1,
    )
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=transforms,
        output_shape=shape[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )


def change_contrast(images: Any, factor: Any) -> Any:
    """Stretch each channel about its mean by `factor`, (batch,); stay within 0..255."""
    mean = tf.reduce_mean(images, axis=(1, 2), keepdims=True)
    stretched = (images - mean) * factor[:, None, None, None] + mean
    return tf.clip_by_value(stretched, 0.0, 255.0)


def mirror_half(images: Any, seed: Any, recipe: Recipe) -> Any:
    """Flip each image left-right with probability one half; a view for loader features is not
    drawn (`har.training.features.View`).
    """
    flipped = tf.random.stateless_uniform([tf.shape(images)[0]], seed) < 0.5
    return tf.where(flipped[:, None, None, None], mirror(images), images)


def mirror(images: Any) -> Any:
    """Flip (batch, height, width, channels) images left-right."""
    return tf.reverse(images, [2])


def crop_flip_color(images: Any, seed: Any, recipe: Recipe) -> Any:
    """Crop a random part of each image, flip, and change brightness and contrast.

    Maps (batch, height, width, 3) of 0..255 to float32 at the recipe's image size. A crop has
    `crop_area` to 1 of the area, and sides of a ratio up to CROP_RATIO.
    """
    count = tf.shape(images)[0]
    draw = tf.random.stateless_uniform((7, count), seed, minval=-1.0, maxval=1.0)
    part = (draw + 1) / 2
    area = recipe.crop_area + (1 - recipe.crop_area) * part[0]
    ratio = tf.exp(draw[1] * np.log(CROP_RATIO))
    height, width = (tf.minimum(1.0, tf.sqrt(each)) for each in (area / ratio, area * ratio))
    top, left = part[2] * (1 - height), part[3] * (1 - width)
    # a box from right to left is resampled as its mirror image
    flipped, right = draw[4] < 0, left + width
    sides = tf.where(flipped, right, left), tf.where(flipped, left, right)
    boxes = tf.stack([top, sides[0], top + height, sides[1]], axis=1)
    size = (recipe.image_size, recipe.image_size)
    cropped = tf.image.crop_and_resize(images, boxes, tf.range(count), size)
    lit = cropped * (1 + CROP_BRIGHTNESS * draw[5])[:, None, None, None]
    return change_contrast(lit, 1 + CROP_CONTRAST * draw[6])


# From images, a seed and the recipe to images of the recipe's size.
AUGMENTATIONS: dict[str, Callable[[Any, Any, Recipe], Any]] = {
    "none": lambda images, seed, recipe: images,
    "flip_rotate_zoom_contrast": augment,
    "mirror": mirror_half,
    "crop_flip_color": crop_flip_color,
}


def mixup(inputs: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
    """Blend each input of a shuffled batch, and its one-hot label, with the next one's."""
    seed = tf.random.experimental.stateless_fold_in(seed, 1)
    shape = (2, tf.shape(inputs)[0])
    first, second = tf.unstack(tf.random.stateless_gamma(shape, seed, MIXUP_ALPHA))
    # both can be 0 in float32
    share = (first + 1e-30) / (first + second + 2e-30)

    def blend(values: Any) -> Any:
        values = tf.cast(values, tf.float32)
        own = tf.reshape(share, [-1, *[1] * (len(values.shape) - 1)])
        return own * values + (1 - own) * tf.roll(values, 1, axis=0)

    return blend(inputs), blend(labels)


MIXINGS: dict[str, Callable[[Any, Any, Any], tuple[Any, Any]]] = {
    "none": lambda inputs, labels, seed: (inputs, labels),
    "mixup": mixup,
}
