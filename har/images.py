"""Bytes to pixels: the only decoding code, for every loader and for serving.

An image is (height, width, 3) uint8, 0..255, RGB. Decoding is always Pillow's; the
recipe's `resize` axis decides only how the decoded image becomes a square:

- bicubic: Pillow's `Image.resize` default, which averages over the source pixels
  (antialiased), as the original notebook and v1 did;
- bilinear: `tf.image.resize` default, which reads the four nearest source pixels, as v2
  to v4 did, rounded to whole levels.

TensorFlow's own JPEG decoder returns the same pixels as Pillow's when told to use the
accurate DCT. `decode_in_graph` uses it where it can, because it needs no Python per image.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from har.errors import UserError, first_line

Pixels = npt.NDArray[np.uint8]

# A 25-megapixel phone photograph is 75 MB decoded; nothing in this field needs more.
MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageError(UserError):
    """Bytes that are no image this project accepts; the message says why, in a few words."""


def open_image(data: bytes) -> Image.Image:
    """The image's header, pixels not yet decoded.

    Raises:
        ImageError: not one of `FORMATS`, or more than `MAX_PIXELS` pixels.
    """
    if not data:
        raise ImageError("empty: 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    # Pillow raises many kinds on hostile bytes (struct.error, SyntaxError, its own bomb error)
    except Exception as error:
        raise ImageError(f"not an image of the kinds {', '.join(FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def decode_rgb(data: bytes) -> Pixels:
    """(height, width, 3) uint8: first frame, upright by its EXIF tag, transparency on white.

    Raises:
        ImageError: as `open_image`, or truncated or corrupt pixel data.
    """
    image = open_image(data)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion cuts off at 255 instead of scaling 65535 to it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except Exception as error:
        raise ImageError(f"cannot be decoded: {first_line(error)}") from error


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether TensorFlow's decoder sees in this file just what Pillow sees.

    It knows neither CMYK nor the EXIF orientation.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1


def resize_bicubic(image: Pixels, size: int) -> Pixels:
    """(h, w, 3) to (size, size, 3) as Pillow's default filter does."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_bilinear(image: Pixels, size: int) -> Pixels:
    """(h, w, 3) to (size, size, 3) as `tf.image.resize` does, rounded."""
    return np.asarray(bilinear_in_graph(image, size))


def bilinear_in_graph(image: Any, size: int) -> Any:
    """The same on a tensor."""
    import tensorflow as tf

    return tf.cast(tf.round(tf.image.resize(image, (size, size))), tf.uint8)


RESIZERS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "bicubic": resize_bicubic,
    "bilinear": resize_bilinear,
}


def decode(data: bytes, resize: str, size: int) -> Pixels:
    """Bytes to (size, size, 3) uint8, `resize` being the recipe's axis.

    Raises:
        ImageError: as `decode_rgb`.
    """
    return RESIZERS[resize](decode_rgb(data), size)


def decode_in_graph(path: Any, plain_jpeg: Any, resize: str, size: int) -> Any:
    """`decode` of a file inside a tf.data pipeline: scalar string and bool tensors to
    (size, size, 3) uint8, equal to `decode` to the bit.
    """
    import tensorflow as tf

    data = tf.io.read_file(path)

    def in_python() -> Any:
        # stateless: TensorFlow may run it in parallel and still promise the same order
        return tf.numpy_function(
            lambda b: decode(b, resize, size), [data], tf.uint8, stateful=False
        )

    def in_tensorflow() -> Any:
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return bilinear_in_graph(image, size)

    fast = plain_jpeg if resize == "bilinear" else tf.constant(False)
    return tf.ensure_shape(tf.cond(fast, in_tensorflow, in_python), (size, size, 3))
