"""PNG, WebP and AVIF files, which consist of chunks, reduced to their first frame's pixels.

Each `strip_*` function takes a file's bytes from the kind's first bytes on, and returns the same
image without metadata, so that no decoder spends time or memory on them. They check structure:
whether all pixels are there is seen when they are decoded.
"""

import re
import zlib
from collections.abc import Iterator, Mapping

from har.data.encoded import (
    MAX_METADATA,
    Bytes,
    EncodedImage,
    ImageError,
    corrupt,
    find_orientation,
    truncated,
)

# An image of 60 MB in the usual chunks of 8 kB has 7,500.
MAX_CHUNKS = 50_000
# AVIF: a photo has a kilobyte of properties, a mosaic of tiles some ten.
MAX_AVIF_HEADER = 262_144
MAX_AVIF_BOXES = 100
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_PROFILE = b"Raw profile type exif"


def strip_png(data: bytes) -> EncodedImage:
    """Keep a PNG's header, palette, transparent colours and pixels, the latter in one chunk.

    Raises:
        ImageError: a checksum of these is wrong, or there are no pixels.
    """
    kept: dict[bytes, Bytes] = {}
    metadata: dict[bytes, Bytes] = {}
    pixels: list[Bytes] = []
    for name, body, checksum in _png_chunks(data):
        if not kept and name != b"IHDR":
            if name == b"CgBI":
                raise ImageError(
                    "a PNG in Apple's own form: convert it, for example `magick IN OUT.png`"
                )
            raise corrupt("its header is not at its start")
        if name in (b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
            keyword = bytes(body[:32]).partition(b"\0")[0]
            metadata.setdefault(name if name == b"eXIf" else name + keyword, body[:MAX_METADATA])
        elif name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if checksum is not None and checksum != zlib.crc32(body, zlib.crc32(name)):
                raise corrupt(f"wrong checksum of its {name.decode()} chunk")
            if name == b"IDAT":
                pixels.append(body)
            else:
                kept.setdefault(name, body)
    header = bytes(kept.get(b"IHDR", b""))
    if len(header) != 13 or not any(pixels):
        raise truncated("the PNG ends before them")
    return EncodedImage(
        kind="PNG",
        data=_write_png({**kept, b"IDAT": b"".join(pixels), b"IEND": b""}),
        width=int.from_bytes(header[:4]),
        height=int.from_bytes(header[4:8]),
        orientation=find_orientation(
            metadata.get(b"eXIf") or _read_png_profile(metadata),
            metadata.get(b"iTXtXML:com.adobe.xmp"),
        ),
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, Bytes, int | None]]:
    """Yield (name, body, checksum) until IEND or the file's end; no checksum of a cut chunk."""
    view, position = memoryview(data), len(_PNG_START)
    for _ in range(MAX_CHUNKS):
        body = position + 8
        size, name = int.from_bytes(view[position : position + 4]), data[position + 4 : body]
        if name == b"IEND" or len(name) < 4:
            return
        end = body + size
        checksum = int.from_bytes(view[end : end + 4]) if end + 4 <= len(data) else None
        yield name, view[body:end], checksum
        position = end + 4
    raise ImageError(f"a PNG of more than {MAX_CHUNKS:,} chunks")


def _write_png(chunks: Mapping[bytes, Bytes]) -> bytes:
    parts: list[Bytes] = [_PNG_START]
    for name, body in chunks.items():
        checksum = zlib.crc32(body, zlib.crc32(name))
        parts += [len(body).to_bytes(4), name, body, checksum.to_bytes(4)]
    return b"".join(parts)


def _read_png_profile(metadata: Mapping[bytes, Bytes]) -> bytes | None:
    """Exif data as ImageMagick writes them: a text chunk of hexadecimal digits."""
    try:
        if body := metadata.get(b"zTXt" + _PNG_PROFILE):
            # the keyword, a zero byte, and the number of the compression
            packed = body[len(_PNG_PROFILE) + 2 :]
            text = zlib.decompressobj().decompress(packed, MAX_METADATA)
        else:
            text = bytes(metadata.get(b"tEXt" + _PNG_PROFILE, b""))
        # a line break, the name and the size come first
        digits = b"".join(text.split(b"\n")[3:])
        return bytes.fromhex(digits[: len(digits) // 2 * 2].decode())
    except (ValueError, zlib.error):
        return None


def strip_webp(data: bytes) -> EncodedImage:
    """Keep a WebP's first frame: pixels and transparency."""
    kept: list[tuple[bytes, Bytes]] = []
    metadata: dict[bytes, Bytes] = {}
    for name, body, cut in _webp_chunks(data):
        if name in (b"EXIF", b"XMP "):
            metadata.setdefault(name, body[:MAX_METADATA])
        # the first of each: an animation has many frames
        elif name in (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"):
            if name in [each for each, _ in kept]:
                continue
            if cut:
                raise truncated("the WebP ends within them")
            kept.append((name, body))
    if not kept or kept[0][0] not in (b"VP8X", b"VP8 ", b"VP8L") or len(kept[0][1]) < 10:
        raise truncated("the WebP ends before them")
    if kept[0][0] == b"VP8X":
        # transparency and animation: no colour profile, Exif and XMP
        kept[0] = (b"VP8X", bytes([kept[0][1][0] & 0x12]) + bytes(kept[0][1][1:]))
    parts: list[Bytes] = []
    for name, body in kept:
        parts += [name, len(body).to_bytes(4, "little"), body, b"\0" * (len(body) % 2)]
    size = 4 + sum(map(len, parts))
    width, height = _webp_sides(*kept[0])
    return EncodedImage(
        kind="WEBP",
        data=b"".join([b"RIFF", size.to_bytes(4, "little"), b"WEBP", *parts]),
        width=width,
        height=height,
        orientation=find_orientation(metadata.get(b"EXIF"), metadata.get(b"XMP ")),
    )


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, Bytes, bool]]:
    """Yield (name, body, True if it is cut)."""
    view, position = memoryview(data), 12
    for _ in range(MAX_CHUNKS):
        name, size = data[position : position + 4], data[position + 4 : position + 8]
        if len(size) < 4:
            return
        body = position + 8
        position = body + int.from_bytes(size, "little")
        yield name, view[body:position], position > len(data)
        position += position % 2
    raise ImageError(f"a WebP of more than {MAX_CHUNKS:,} chunks")


def _webp_sides(name: bytes, body: Bytes) -> tuple[int, int]:
    if name == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if name == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = body[6:8], body[8:10]
    return int.from_bytes(width, "little") & 0x3FFF, int.from_bytes(height, "little") & 0x3FFF


# In a list of items: version 2 or 3, then flags, the item's number, and a protection index.
_AVIF_METADATA = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))(?:Exif|mime)", re.DOTALL)
_AVIF_SIDES = re.compile(rb"ispe\0\0\0\0(.{4})(.{4})", re.DOTALL)


def strip_avif(data: bytes) -> EncodedImage:
    """Make an AVIF's Exif and XMP unknown items, which no decoder reads.

    Turning and mirroring are properties of the pixels in this kind of file.
    """
    start, end = _find_avif_header(data)
    header = data[start:end]
    items = max(header.find(b"iinf") - 4, 0)
    items_end = items + int.from_bytes(header[items : items + 4])
    unknown = _AVIF_METADATA.sub(rb"\1none", header[items:items_end])
    header = header[:items] + unknown + header[items_end:]
    sides = [(int.from_bytes(w), int.from_bytes(h)) for w, h in _AVIF_SIDES.findall(header)]
    if not sides:
        raise corrupt("it does not say its size")
    width, height = max(sides, key=lambda each: each[0] * each[1])
    return EncodedImage(
        kind="AVIF", data=data[:start] + header + data[end:], width=width, height=height
    )


def _find_avif_header(data: bytes) -> tuple[int, int]:
    """Where the box `meta` lies, which describes the image."""
    position = 0
    for _ in range(MAX_AVIF_BOXES):
        size, name = (
            int.from_bytes(data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        if name == b"meta" and size > MAX_AVIF_HEADER:
            raise ImageError(f"an AVIF described in more than {MAX_AVIF_HEADER:,} bytes")
        end = position + size
        if size < 8 or end > len(data):
            break
        if name == b"meta":
            return position, end
        position = end
    raise truncated("the AVIF ends before its description")
