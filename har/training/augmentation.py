"""Random changes to a batch of training images, as functions of a seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

AUGMENT_ROTATION_TURNS = 0.1
AUGMENT_ZOOM = 0.1
AUGMENT_CONTRAST = 0.1


def augment(images: Any, seed: Any) -> Any:
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


AUGMENTATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda images, seed: images,
    "flip_rotate_zoom_contrast": augment,
}
