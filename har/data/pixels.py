"""Encoded images to RGB pixels: simplejpeg for JPEG, Pillow for all other kinds."""

import ctypes
import io
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError, _imaging

from har.data.encoded import EncodedImage, ImageError, corrupt, truncated
from har.data.jpeg import decode_jpeg
from har.util.errors import first_line

Pixels = npt.NDArray[np.uint8]
# Pillow would load all its plugins at the first image of a kind that is not loaded.
for _kind in ("Avif", "Bmp", "Gif", "Png", "Tiff", "WebP"):
    import_module(f"PIL.{_kind}ImagePlugin")
# libtiff would print its errors, without the file's name; Pillow raises them too.
with suppress(AttributeError, OSError):
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)
# Pillow's images become arrays in parts of about so many pixels, to save memory.
PART_PIXELS = 1_000_000


def decode_pixels(image: EncodedImage) -> Pixels:
    """Decode an image to (height, width, 3) uint8: first frame, upright, transparency on white.

    Raises:
        ImageError: pixels are missing or corrupt, or Pillow cannot decode them.
    """
    try:
        found = decode_jpeg(image) if image.kind == "JPEG" else None
        if found is None:
            return _decode_with_pillow(image)
        if image.components != 3:
            found = _cmyk_to_rgb(found) if image.components == 4 else np.repeat(found, 3, axis=2)
        return _turn_upright(found, image.orientation)
    except ImageError:
        raise
    # its message names no reason
    except UnidentifiedImageError as error:
        raise corrupt("Pillow cannot read its header") from error
    # Pillow raises errors of many types on hostile bytes, such as struct.error and SyntaxError
    except Exception as error:
        reason = first_line(error)
        if "truncated" in reason:
            raise truncated(reason) from error
        raise ImageError(f"cannot be decoded: {reason}") from error


def _decode_with_pillow(image: EncodedImage) -> Pixels:
    opened = Image.open(io.BytesIO(image.data), formats=[image.kind])
    if opened.width * opened.height > image.pixels:
        raise corrupt("it has more pixels than its header says")
    if opened.mode in ("I", "F"):
        raise ImageError("32 bits a colour: convert it to 8 bits")
    pixels = np.empty((opened.height, opened.width, 3), np.uint8)
    for rows in _parts(opened.height, opened.width):
        part = opened.crop((0, rows.start, opened.width, rows.stop))
        pixels[rows] = np.asarray(_part_to_rgb(part))
    if image.kind == "AVIF":
        # Pillow gives the turning that is part of the pixels as if it were Exif's
        return _turn_upright(pixels, opened.getexif().get(ExifTags.Base.Orientation, 1))
    return _turn_upright(pixels, image.orientation)


def _parts(height: int, width: int) -> Iterator[slice]:
    """Slices of rows that hold about PART_PIXELS pixels each."""
    rows = max(1, PART_PIXELS // width)
    for top in range(0, height, rows):
        yield slice(top, min(top + rows, height))


def _part_to_rgb(part: Image.Image) -> Image.Image:
    if part.mode.startswith("I;16"):
        # Pillow would clip 16-bit values at 255 instead of scaling them
        part = Image.fromarray((np.asarray(part) >> 8).astype(np.uint8))
    if part.has_transparency_data:
        part = part.convert("RGBA")
        part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
    return part if part.mode == "RGB" else part.convert("RGB")


def _cmyk_to_rgb(inverted: Pixels) -> Pixels:
    height, width, _ = inverted.shape
    pixels = np.empty((height, width, 3), np.uint8)
    for rows in _parts(height, width):
        part = (width, rows.stop - rows.start)
        image = Image.frombytes("CMYK", part, inverted[rows].tobytes(), "raw", "CMYK;I")
        pixels[rows] = np.asarray(image.convert("RGB"))
    return pixels


# From pixels as stored to upright ones, by orientation.
_UPRIGHT: dict[int, Callable[[Any], Any]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].T,
    8: np.rot90,
}


def _turn_upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation not in _UPRIGHT:
        return pixels
    # as elements of 3 bytes: they move twice as fast as single bytes
    whole = pixels.view("V3")[:, :, 0]
    upright = np.ascontiguousarray(_UPRIGHT[orientation](whole))
    return upright.view(np.uint8).reshape(*upright.shape, 3)
