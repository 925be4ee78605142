"""Image files for tests: well-formed ones, and parts to build damaged and costly ones from."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

JPEG_END = b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"


def gradient(height: int = 48, width: int = 64) -> Image.Image:
    """A picture whose pixels all differ from their neighbours."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([(x * 4) % 256, (y * 5) % 256, (x + y) % 256], -1).astype(np.uint8)
    )


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """A JPEG with more segments after its first two bytes."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", more: bytes = b"") -> bytes:
    """Exif data of tags: (number, type, count, 4 bytes of value or offset)."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    table = struct.pack(f"{order}H", len(entries))
    table += b"".join(struct.pack(f"{order}HHL", *entry[:3]) + entry[3] for entry in entries)
    return start + struct.pack(f"{order}L", 8) + table + bytes(4) + more


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bad_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    good = chunk(name, body)
    return good[:-1] + bytes([good[-1] ^ 1])


def png(
    image: Image.Image, before: bytes = b"", after: bytes = b"", end: bytes = chunk(b"IEND", b"")
) -> bytes:
    """A PNG with more chunks before and after its pixels."""
    pixels = np.asarray(image.convert("RGB"))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    data = chunk(b"IDAT", zlib.compress(rows))
    return PNG_START + chunk(b"IHDR", header) + before + data + after + end


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    parts = b"".join(
        name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for name, body in chunks
    )
    return b"RIFF" + struct.pack("<I", len(parts) + 4) + b"WEBP" + parts


def webp_pixels(image: Image.Image) -> tuple[bytes, bytes]:
    """The chunk of a lossless WebP that holds the pixels."""
    data = encode(image, "WEBP", lossless=True)
    return data[12:16], data[20 : 20 + struct.unpack("<I", data[16:20])[0]]


def webp_header(image: Image.Image, flags: int) -> tuple[bytes, bytes]:
    sides = struct.pack("<I", image.width - 1)[:3] + struct.pack("<I", image.height - 1)[:3]
    return b"VP8X", bytes([flags, 0, 0, 0]) + sides


def tiff(
    image: Image.Image, *more: tuple[int, int, int, int], compression: int = 1, strips: int = 1
) -> bytes:
    """A TIFF of RGB pixels; `more` tags are (number, type, count, value or offset)."""
    pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    data = pixels.tobytes()
    offsets = 8 + len(data)
    tags = {
        256: (3, 1, width),
        257: (3, 1, height),
        258: (3, 3, offsets),
        259: (3, 1, compression),
        262: (3, 1, 2),
        273: (4, strips, 8 if strips == 1 else offsets + 6),
        277: (3, 1, 3),
        278: (3, 1, -(-height // strips)),
        279: (4, strips, len(data) if strips == 1 else offsets + 6 + 4 * strips),
    }
    tags |= {number: tag for number, *tag in more}
    tables = struct.pack("<HHH", 8, 8, 8)
    if strips > 1:
        size = len(data) // strips
        tables += b"".join(struct.pack("<L", 8 + size * i) for i in range(strips))
        tables += struct.pack("<L", size) * strips
    entries = b"".join(struct.pack("<HHLL", number, *tags[number]) for number in sorted(tags))
    table = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<L", offsets + len(tables)) + data + tables + table
