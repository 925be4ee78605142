"""Bytes to pixels: the only code that decodes images, for every loader and for serving.

An image is (height, width, 3) uint8, 0..255, RGB. Images decode as in Pillow. The recipe's
`resize` decides only how the decoded image becomes a square:

- bicubic: the default of Pillow's `Image.resize`, which averages over the source pixels
  (antialiased), as in the original notebook and v1;
- bilinear: the default of `tf.image.resize`, which reads the four nearest source pixels, as in
  v2 to v4, rounded to whole levels.

TensorFlow's JPEG decoder returns the same pixels as Pillow's if it uses the accurate DCT.
`decode_in_graph` uses it where possible, because it needs no Python code for each image.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from har.util.errors import UserError, first_line

Pixels = npt.NDArray[np.uint8]
# Limits of one image. A 25-megapixel photo of a phone has about 10 MB, decoded 75 MB.
MAX_BYTES = 25_000_000
MAX_PIXELS = 50_000_000
# The limit of JPEG. An image of one pixel by millions takes seconds and gigabytes to resize.
MAX_SIDE = 65_535
# A progressive JPEG has about ten scans. A scan of 75 bytes can make the decoder go over all
# pixels again.
MAX_SCANS = 100
START_OF_SCAN = b"\xff\xda"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageError(UserError):
    """Bytes that are not an accepted image; the message gives the reason in a few words."""


def read_image(path: Path) -> bytes:
    """Read the bytes of an image file; raise an ImageError if that is not possible."""
    try:
        if not path.is_file():
            raise ImageError("not a file" if path.exists() else "no such file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ImageError(f"{size:,} bytes, more than {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; raise an ImageError for an unknown format or beyond a limit."""
    if not data:
        raise ImageError("empty: 0 bytes")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from error
    # Pillow raises errors of many types on hostile bytes, such as struct.error and SyntaxError
    except Exception as error:
        raise ImageError(f"not an image of the kinds {', '.join(FORMATS)}") from error
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{size}, more than {MAX_PIXELS:,}")
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"{size}, a side longer than {MAX_SIDE:,}")
    # an MPO file holds several JPEGs; the first one is read
    if image.format in ("JPEG", "MPO") and data.count(START_OF_SCAN) > MAX_SCANS:
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")
    return image


def decode_rgb(data: bytes) -> Pixels:
    """Decode image bytes to (height, width, 3) uint8, as `open_image` and `to_rgb` do."""
    return np.asarray(to_rgb(open_image(data)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an open image: first frame, upright by its EXIF tag, transparency on white.

    The image itself may change. Truncated or corrupt pixel data raise an ImageError.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit values at 255 instead of scaling them
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        # Pillow reads pixels lazily: make sure that errors appear here
        image.load()
        return image
    except Exception as error:
        raise ImageError(f"cannot be decoded: {first_line(error)}") from error


def is_plain_jpeg(image: Image.Image) -> bool:
    """Return True if TensorFlow decodes the file like Pillow: no CMYK, no EXIF orientation."""
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def resize_bicubic(image: Pixels, size: int) -> Pixels:
    """Resize (height, width, 3) to (size, size, 3) with Pillow's default filter."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_bilinear(image: Pixels, size: int) -> Pixels:
    """Resize (height, width, 3) to (size, size, 3) like `tf.image.resize`, rounded."""
    import tensorflow as tf

    # tf.image.resize calls this operation, after checks that take longer. On the CPU, as
    # `bilinear_in_graph`: the bits of a GPU may differ.
    with tf.device("CPU"):
        resized = tf.raw_ops.ResizeBilinear(
            images=image[None], size=(size, size), half_pixel_centers=True
        ).numpy()[0]
    return np.rint(resized, out=resized).astype(np.uint8)


def bilinear_in_graph(image: Any, size: int) -> Any:
    """Do the same as `resize_bilinear` with a tensor in a tf.data pipeline."""
    import tensorflow as tf

    return tf.cast(tf.round(tf.image.resize(image, (size, size))), tf.uint8)


RESIZERS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "bicubic": resize_bicubic,
    "bilinear": resize_bilinear,
}


def decode(data: bytes, resize: str, size: int) -> Pixels:
    """Decode bytes to (size, size, 3) uint8, or raise an ImageError; `resize` is in RESIZERS."""
    image = decode_rgb(data)
    try:
        return RESIZERS[resize](image, size)
    except Exception as error:
        raise ImageError(f"cannot be resized: {first_line(error)}") from error


def decode_in_graph(path: Any, plain_jpeg: Any, resize: str, size: int) -> Any:
    """Do the same as `decode` with a file in a tf.data pipeline, to the same bits.

    `path` is a scalar string tensor; `plain_jpeg` is a scalar bool tensor, or True if all images
    of the pipeline are plain JPEGs.
    """
    import tensorflow as tf

    data = tf.io.read_file(path)

    def in_python() -> Any:
        # stateful=False lets TensorFlow run this in parallel and keep the order
        return tf.numpy_function(
            lambda b: decode(b, resize, size), [data], tf.uint8, stateful=False
        )

    def in_tensorflow() -> Any:
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return bilinear_in_graph(image, size)

    if resize != "bilinear":
        image = in_python()
    elif plain_jpeg is True:
        # without a tf.cond, the pipeline takes an eighth less time
        image = in_tensorflow()
    else:
        image = tf.cond(plain_jpeg, in_tensorflow, in_python)
    return tf.ensure_shape(image, (size, size, 3))
