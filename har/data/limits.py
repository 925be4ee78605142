"""The most that an image may cost.

Decoding takes at most about 1 s and 350 MB more than a plain JPEG of as many pixels and bytes, else
the image is refused. Metadata cost nothing: they are removed before.
"""

import math
from dataclasses import dataclass

from har.data.encoded import EncodedImage, ImageError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most bytes and pixels that an image may have."""

    bytes: int
    pixels: int


# A phone's photo of 108 megapixels has up to 50 MB.
TRAINING_LIMITS = Limits(bytes=60_000_000, pixels=125_000_000)
# A photo of 25 megapixels has about 10 MB; a server decodes several at a time.
SERVING_LIMITS = Limits(bytes=25_000_000, pixels=50_000_000)
# Measured on the costliest files of each kind: what they take a pixel more than the 9 ns and
# 3 bytes of a plain JPEG, or in all where the bytes decide.
LIMITS_OF_KIND = {
    "JPEG": TRAINING_LIMITS,
    # 16 bits and transparency: 24 ns, 5 bytes
    "PNG": Limits(bytes=60_000_000, pixels=40_000_000),
    # transparency: 10 ns, 13 bytes; in all 28 ns a byte of the file
    "WEBP": Limits(bytes=30_000_000, pixels=25_000_000),
    # transparency: 6 ns, 2 bytes
    "GIF": Limits(bytes=60_000_000, pixels=50_000_000),
    # one bit a pixel: 0 ns, 2 bytes
    "BMP": Limits(bytes=60_000_000, pixels=50_000_000),
    # CMYK: 13 ns, 8 bytes
    "TIFF": Limits(bytes=60_000_000, pixels=40_000_000),
    # transparency: 16 ns, 9 bytes; in all 65 ns a byte of the file
    "AVIF": Limits(bytes=15_000_000, pixels=25_000_000),
}
# For coefficients of progressive JPEGs, and CMYK.
MAX_EXTRA_BYTES = 350_000_000
# The limit of JPEG. An image of one pixel by millions takes seconds and gigabytes to resize.
MAX_SIDE = 65_535
# A scan of a few bytes makes the decoder go over all pixels again, in up to 1 ns a pixel. Encoders
# write up to 15.
MAX_SCANS = 100
MIN_MAX_SCANS = 15
MAX_SCANNED_PIXELS = 1_000_000_000


def check_cost(image: EncodedImage, limits: Limits) -> None:
    """Raise an ImageError if an image has no pixels, or would cost more than the limits allow."""
    most = min(limits.pixels, LIMITS_OF_KIND[image.kind].pixels)
    size = f"{image.width}x{image.height} pixels"
    if image.width < 1 or image.height < 1:
        raise ImageError(f"no pixels: {size}")
    if image.pixels > most:
        raise ImageError(f"{size}, more than {most:,}")
    if max(image.width, image.height) > MAX_SIDE:
        raise ImageError(f"{size}, a side longer than {MAX_SIDE:,}")
    if image.pixels * image.extra_bytes > MAX_EXTRA_BYTES:
        most = int(MAX_EXTRA_BYTES / image.extra_bytes)
        raise ImageError(f"{size}, more than {most:,} in a progressive or CMYK JPEG")
    scans = min(MAX_SCANS, max(MIN_MAX_SCANS, MAX_SCANNED_PIXELS // image.pixels))
    if image.scans > scans:
        raise ImageError(f"{size} in a JPEG of {image.scans} scans, more than {scans}")


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """The most that the images of one request may cost together: the request's bytes, its rows, the
    pixels that the images' headers announce, and the seconds after which no more is read.
    """

    bytes: float = math.inf
    rows: float = math.inf
    pixels: float = math.inf
    seconds: float = math.inf


UNLIMITED = RequestLimits()
# The largest image of SERVING_LIMITS in base64 with line breaks fits. 500 megapixels are 40 photos
# of 12 megapixels; they take 4 to 14 s of CPU time. MLflow's server gives up after 60 s.
SERVED_REQUEST = RequestLimits(bytes=36_000_000, rows=1000, pixels=500_000_000, seconds=45)
