"""Bytes to pixels: the only code that decodes images, for every loader and for serving.

An image is (height, width, 3) uint8, 0..255, RGB. Images decode as in Pillow. The recipe's
`resize` decides only how the decoded image becomes a square:

- bicubic: the default of Pillow's `Image.resize`, which averages over the source pixels
  (antialiased), as in the original notebook and v1;
- bilinear: the default of `tf.image.resize`, which reads the four nearest source pixels, as in
  v2 to v4, rounded to whole levels.

TensorFlow's JPEG decoder returns the same pixels as Pillow's if it uses the accurate DCT.
`decode_in_graph` uses it where possible, because it needs no Python code for each image.

Damaged files: one policy, the same in preparing, training, predicting and serving.

- Pixels that are missing or corrupt, as far as the file's format shows it, are an error of that
  image. The message names the cause. A JPEG has no checksums: damage that still decodes is unseen.
- An image whose end marker alone is missing is accepted.
- Metadata never decides about pixels, whatever is wrong in it: Exif, colour profiles, text, bytes
  before the first and after the last of the image. Only the orientation is read from it.
- An image with nothing to see, one colour or all transparent, is accepted (see `is_blank`).

Metadata is removed before a decoder sees the file; `har.data.limits` bounds the cost of the rest.
"""

import errno
import functools
import logging
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from har.data.bitmaps import check_bmp, strip_gif, strip_tiff
from har.data.chunks import strip_avif, strip_png, strip_webp
from har.data.encoded import EncodedImage, corrupt
from har.data.encoded import ImageError as ImageError
from har.data.jpeg import strip_jpeg
from har.data.kinds import HEAD_BYTES, READABLE, describe_kind, explain_kind, find_kind
from har.data.limits import LIMITS_OF_KIND, TRAINING_LIMITS, Limits, check_cost
from har.data.pixels import Pixels as Pixels
from har.data.pixels import decode_pixels
from har.util.errors import first_line

# Images larger than this are decoded one at a time in a process.
LARGE_PIXELS = 25_000_000
_STRIP: dict[str, Callable[[bytes], EncodedImage]] = {
    "PNG": strip_png,
    "WEBP": strip_webp,
    "GIF": strip_gif,
    "BMP": check_bmp,
    "TIFF": strip_tiff,
    "AVIF": strip_avif,
}
_large_images = threading.RLock()

# one line for each odd image would fill a log, and says nothing about pixels
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


def read_image(path: Path, inside: Path | None = None, limits: Limits = TRAINING_LIMITS) -> bytes:
    """Read the bytes of an image file; raise an ImageError if that is not possible.

    Only regular files are read, and with `inside` only those in that folder, also after links are
    followed.
    """
    # without O_NONBLOCK, opening a named pipe waits for somebody who writes to it
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    # no file can have the name, such as one with a zero byte
    except ValueError as error:
        raise ImageError("no such file") from error
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        reason = "no such file" if missing else f"cannot be read: {error.strerror}"
        raise ImageError(reason) from error
    try:
        found = os.fstat(descriptor)
        if inside is not None and not _is_inside(descriptor, path, inside):
            raise ImageError("a link out of the data folder")
        if not stat.S_ISREG(found.st_mode):
            raise ImageError("not a file")
        check_bytes(found.st_size, limits.bytes)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(found.st_size)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


_real_folder = functools.lru_cache(maxsize=64)(os.path.realpath)


def _is_inside(descriptor: int, path: Path, folder: Path) -> bool:
    """Return True if an open file lies in a folder, after all links are followed."""
    try:
        # Linux knows it at once; to follow the links of each path takes as long as to decode
        real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        real = Path(os.path.realpath(path))
    return real.is_relative_to(_real_folder(folder)) or real.is_relative_to(folder.resolve())


def check_bytes(size: int, most: int) -> None:
    """Raise an ImageError for a file of no bytes, or of more than `most`."""
    if not size:
        raise ImageError("empty: 0 bytes")
    if size > most:
        raise ImageError(f"{size:,} bytes, more than {most:,}")


def open_image(data: bytes, limits: Limits = TRAINING_LIMITS) -> EncodedImage:
    """Read an image's header and remove its metadata; raise an ImageError for an unknown kind or
    beyond a limit.
    """
    check_bytes(len(data), limits.bytes)
    kind, start = find_kind(data[:HEAD_BYTES])
    if kind not in READABLE:
        kinds = ", ".join(sorted(READABLE))
        raise ImageError(
            f"{describe_kind(kind)}, not an image that is read: {explain_kind(kind)}"
            if kind
            else f"not an image of the kinds {kinds}"
        )
    check_bytes(len(data), LIMITS_OF_KIND[kind].bytes)
    try:
        image = strip_jpeg(data, start) if kind == "JPEG" else _STRIP[kind](data[start:])
    except ImageError:
        raise
    except Exception as error:
        raise corrupt(first_line(error)) from error
    check_cost(image, limits)
    return image


@contextmanager
def large_images_in_turn(image: EncodedImage) -> Iterator[None]:
    """Wait until no other thread is in here with a large image, if this one is large."""
    if image.pixels <= LARGE_PIXELS:
        yield
        return
    with _large_images:
        yield


def decode_rgb(data: bytes, limits: Limits = TRAINING_LIMITS) -> Pixels:
    """Decode image bytes to (height, width, 3) uint8: first frame, upright by its orientation,
    transparency on white.

    Pixels that are missing or corrupt raise an ImageError.
    """
    image = open_image(data, limits)
    with large_images_in_turn(image):
        return decode_pixels(image)


def to_rgb(image: EncodedImage) -> Image.Image:
    """Do the same as `decode_rgb` with an open image; return a Pillow image."""
    with large_images_in_turn(image):
        return Image.fromarray(decode_pixels(image))


def is_plain_jpeg(image: EncodedImage) -> bool:
    """Return True if TensorFlow decodes the file like Pillow, and it needs not wait its turn."""
    return image.plain_jpeg and image.pixels <= LARGE_PIXELS


def is_blank(image: Image.Image) -> bool:
    """Return True if a decoded image has one colour everywhere."""
    extrema: Any = image.getextrema()
    return all(low == high for low, high in extrema)


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


def decode(data: bytes, resize: str, size: int, limits: Limits = TRAINING_LIMITS) -> Pixels:
    """Decode bytes to (size, size, 3) uint8, or raise an ImageError; `resize` is in RESIZERS."""
    return decode_small(open_image(data, limits), resize, size)


def decode_small(image: EncodedImage, resize: str, size: int) -> Pixels:
    """Do the same as `decode` with an open image."""
    # until it is small
    with large_images_in_turn(image):
        pixels = decode_pixels(image)
        try:
            return RESIZERS[resize](pixels, size)
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
