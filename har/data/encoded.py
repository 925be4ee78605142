"""Image files reduced to what their pixels need, and the orientation that metadata gives them."""

import re
from dataclasses import dataclass

from har.util.errors import UserError

Bytes = bytes | memoryview

EXIF_ORIENTATION = 0x0112
# A camera writes some 20 tags; more than these cost time.
MAX_EXIF_TAGS = 1000
# As Pillow searches it.
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:=["']|>)([0-9])""")
MAX_XMP_BYTES = 65_536


class ImageError(UserError):
    """Bytes that are not an accepted image; the message gives the reason in a few words."""


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


def read_exif_orientation(exif: Bytes) -> int | None:
    """Return the orientation in Exif data, 1 to 8, whatever else in them is wrong; None without
    one.
    """
    exif = bytes(exif[:6]).removeprefix(b"Exif\0\0") + bytes(exif[6:])
    order: dict[bytes, str] = {b"II": "little", b"MM": "big"}
    if (endian := order.get(exif[:2])) is None:
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], endian)  # type: ignore[arg-type]

    table = number(4, 4)
    for index in range(min(number(table, 2), MAX_EXIF_TAGS)):
        entry = table + 2 + 12 * index
        if number(entry, 2) == EXIF_ORIENTATION and entry + 12 <= len(exif):
            # type 4 is a long; the standard wants a short, type 3
            return _valid(number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2))
    return None


def read_xmp_orientation(xmp: Bytes) -> int | None:
    """Return the orientation in XMP data, 1 to 8; None without one."""
    found = _XMP_ORIENTATION.search(xmp[:MAX_XMP_BYTES])
    return _valid(int(found[1])) if found else None


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1
