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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from har.util.errors import UserError, first_line

Pixels = npt.NDArray[np.uint8]
# What one image may cost. A 25-megapixel phone photograph is some 10 MB, and 75 MB decoded;
# nothing in this field needs more.
MAX_BYTES = 25_000_000
MAX_PIXELS = 50_000_000
# JPEG's own limit; a picture of millions by one takes seconds and gigabytes to resize.
MAX_SIDE = 65_535
# A progressive JPEG has about ten. Each goes over all pixels again, for as little as 75 bytes.
MAX_SCANS = 100
START_OF_SCAN = b"\xff\xda"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class ImageError(UserError):
    """Bytes that are no image this project accepts; the message says why, in a few words."""


def read_image(path: Path) -> bytes:
    """A file's bytes, if an image may have so many.

    Raises:
        ImageError: there is none, it is a folder or a pipe, it is too large, or may not be read.
    """
    try:
        if not path.is_file():
            raise ImageError("not a file" if path.exists() else "no such file")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ImageError(f"{size:,} bytes, more than {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error


def open_image(data: bytes) -> Image.Image:
    """The image's header, pixels not yet decoded.

    Raises:
        ImageError: not one of `FORMATS`, or beyond one of the limits above.
    """
    if not data:
        raise ImageError("empty: 0 bytes")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from error
    # Pillow raises many kinds on hostile bytes (struct.error, SyntaxError, its own bomb error)
    except Exception as error:
        raise ImageError(f"not an image of the kinds {', '.join(FORMATS)}") from error
    _refuse_bomb(image, data)
    return image


def _refuse_bomb(image: Image.Image, data: bytes) -> None:
    """Raise an ImageError if the header announces far more work than a photograph is."""
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{size}, more than {MAX_PIXELS:,}")
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"{size}, a side longer than {MAX_SIDE:,}")
    # MPO: several JPEGs in one file, of which the first is read
    if image.format in ("JPEG", "MPO") and data.count(START_OF_SCAN) > MAX_SCANS:
        raise ImageError(f"a JPEG of more than {MAX_SCANS} scans")


def decode_rgb(data: bytes) -> Pixels:
    """(height, width, 3) uint8: first frame, upright by its EXIF tag, transparency on white.

    Raises:
        ImageError: as `open_image` and `to_rgb`.
    """
    return np.asarray(to_rgb(open_image(data)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Of one that is open: its first frame, upright, transparency on white; itself or a copy.

    Raises:
        ImageError: truncated or corrupt pixel data.
    """
    try:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion cuts off at 255 instead of scaling 65535 to it
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")
        # only now are the pixels sure to be read
        image.load()
        return image
    except Exception as error:
        raise ImageError(f"cannot be decoded: {first_line(error)}") from error


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether TensorFlow's decoder sees in this file just what Pillow sees.

    It knows neither CMYK nor the EXIF orientation.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return False
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def resize_bicubic(image: Pixels, size: int) -> Pixels:
    """(h, w, 3) to (size, size, 3) as Pillow's default filter does."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def resize_bilinear(image: Pixels, size: int) -> Pixels:
    """(h, w, 3) to (size, size, 3) as `tf.image.resize` does, rounded."""
    import tensorflow as tf

    # What tf.image.resize calls, without its checks, which take longer. On the CPU, where
    # `bilinear_in_graph` runs too: a GPU need not give the same bits.
    with tf.device("CPU"):
        resized = tf.raw_ops.ResizeBilinear(
            images=image[None], size=(size, size), half_pixel_centers=True
        ).numpy()[0]
    return np.rint(resized, out=resized).astype(np.uint8)


def bilinear_in_graph(image: Any, size: int) -> Any:
    """The same on a tensor inside a tf.data pipeline."""
    import tensorflow as tf

    return tf.cast(tf.round(tf.image.resize(image, (size, size))), tf.uint8)


RESIZERS: dict[str, Callable[[Pixels, int], Pixels]] = {
    "bicubic": resize_bicubic,
    "bilinear": resize_bilinear,
}


def decode(data: bytes, resize: str, size: int) -> Pixels:
    """Bytes to (size, size, 3) uint8, `resize` being the recipe's axis.

    Raises:
        ImageError: as `decode_rgb`, or it cannot be resized (no memory).
    """
    image = decode_rgb(data)
    try:
        return RESIZERS[resize](image, size)
    except Exception as error:
        raise ImageError(f"cannot be resized: {first_line(error)}") from error


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

    if resize == "bilinear" and plain_jpeg is True:
        # nothing to choose for each image: an eighth of the pipeline's time
        return tf.ensure_shape(in_tensorflow(), (size, size, 3))
    fast = plain_jpeg if resize == "bilinear" else tf.constant(False)
    return tf.ensure_shape(tf.cond(fast, in_tensorflow, in_python), (size, size, 3))
