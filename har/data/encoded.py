"""Image files reduced to what their pixels need, and the orientation that metadata gives them."""

import re
from dataclasses import dataclass
from typing import Literal

from har.util.errors import UserError

Bytes = bytes | memoryview

EXIF_ORIENTATION = 0x0112
# A camera writes some 20 tags; more than these cost time.
MAX_EXIF_TAGS = 1000
# As Pillow searches it.
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:=["']|>)([0-9])""")
# The bytes of Exif or XMP that are searched.
MAX_METADATA = 65_536


class ImageError(UserError):
    """Bytes that are not an accepted image; the message gives the reason in a few words."""


def truncated(detail: str) -> ImageError:
    """Build the error of an image whose last pixels are missing."""
    return ImageError(f"cannot be decoded: truncated, pixels are missing ({detail})")


def corrupt(detail: str) -> ImageError:
    """Build the error of an image whose header or pixels are damaged."""
    return ImageError(f"cannot be decoded: corrupt ({detail})")


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image whose header is read and whose pixels are still encoded.

    `data` is a file of `kind`, a member of READABLE, without metadata. `width` and `height` are as
    stored: `orientation` (1 to 8, as in Exif) still has to turn the pixels. `plain_jpeg` is True if
    TensorFlow surely decodes the original file to the same pixels.
    """

    kind: str
    data: bytes
    width: int
    height: int
    orientation: int = 1
    plain_jpeg: bool = False
    # of a JPEG: 1 grey, 3 colours, 4 CMYK
    components: int = 3
    # of a JPEG: how often the decoder goes over all pixels, and the memory that it needs for each
    # pixel besides the pixels
    scans: int = 1
    extra_bytes: float = 0.0

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height


def find_orientation(exif: Bytes | None, xmp: Bytes | None) -> int:
    """Return the orientation, 1 to 8, that Exif data or else XMP data give, whatever else in them
    is wrong; 1 without one.
    """
    found = _read_exif(exif) if exif else None
    if found is None and xmp and (matched := _XMP_ORIENTATION.search(xmp[:MAX_METADATA])):
        found = int(matched[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _read_exif(exif: Bytes) -> int | None:
    data = bytes(exif[:MAX_METADATA]).removeprefix(b"Exif\0\0")
    endian: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], endian)

    table = number(4, 4)
    for index in range(min(number(table, 2), MAX_EXIF_TAGS)):
        entry = table + 2 + 12 * index
        if number(entry, 2) == EXIF_ORIENTATION and entry + 12 <= len(data):
            # type 4 is a long; the standard wants a short, type 3
            return number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
    return None
