"""PNG, WebP, GIF, BMP and AVIF files reduced to what the pixels of their first frame need.

Each function here takes a file's bytes, which begin with the kind's first bytes, and returns the
same image without metadata, so that no decoder spends time or memory on that. They check structure
only: whether all pixels are there is seen when they are decoded.
"""

import re
import zlib
from collections.abc import Iterator

from har.data.encoded import (
    Bytes,
    EncodedImage,
    ImageError,
    read_exif_orientation,
    read_xmp_orientation,
)

# An image of 60 MB in the usual chunks of 8 kB has 7,500.
MAX_CHUNKS = 50_000
# A GIF holds at most 255 bytes in a block: 25 MB in full blocks are 100,000.
MAX_BLOCKS = 250_000
# AVIF: a photo has a kilobyte of properties, a mosaic of tiles some ten.
MAX_AVIF_HEADER = 262_144
MAX_TEXT = 65_536
PNG_START = b"\x89PNG\r\n\x1a\n"


def strip_png(data: bytes) -> EncodedImage:
    """Keep a PNG's header, palette, transparent colours and pixels, the latter in one chunk.

    Raises:
        ImageError: a checksum of these is wrong, or there are no pixels.
    """
    kept: dict[bytes, Bytes] = {}
    pixels: list[Bytes] = []
    exif = xmp = None
    for name, body, checksum in _png_chunks(data):
        if not kept and name != b"IHDR":
            raise ImageError(
                "a PNG in Apple's own form: convert it, for example `magick IN OUT.png`"
                if name == b"CgBI"
                else "a corrupt PNG: its header is not at its start"
            )
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if checksum is not None and checksum != zlib.crc32(body, zlib.crc32(name)):
                raise ImageError(f"a corrupt PNG: wrong checksum of its {name.decode()} chunk")
            if name == b"IDAT":
                pixels.append(body)
            else:
                kept.setdefault(name, body)
        elif name == b"eXIf" and exif is None:
            exif = read_exif_orientation(body[:MAX_TEXT])
        elif name in (b"zTXt", b"tEXt", b"iTXt") and exif is None and xmp is None:
            exif, xmp = _read_png_text(name, bytes(body[:MAX_TEXT]))
    header = bytes(kept.get(b"IHDR", b""))
    if len(header) != 13 or not any(pixels):
        raise ImageError("cut off: the PNG ends before its pixels")
    parts: list[Bytes] = [PNG_START]
    for name, body in [*kept.items(), (b"IDAT", b"".join(pixels)), (b"IEND", b"")]:
        checksum = zlib.crc32(body, zlib.crc32(name))
        parts += [len(body).to_bytes(4), name, body, checksum.to_bytes(4)]
    return EncodedImage(
        kind="PNG",
        data=b"".join(parts),
        width=int.from_bytes(header[:4]),
        height=int.from_bytes(header[4:8]),
        orientation=exif or xmp or 1,
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, Bytes, int | None]]:
    """Yield (name, body, checksum) until IEND or the file's end; no checksum of a cut chunk."""
    view, position = memoryview(data), len(PNG_START)
    for _ in range(MAX_CHUNKS):
        size, name = (
            int.from_bytes(view[position : position + 4]),
            data[position + 4 : position + 8],
        )
        body = position + 8
        if name == b"IEND" or len(name) < 4:
            return
        cut = body + size + 4 > len(data)
        checksum = None if cut else int.from_bytes(view[body + size : body + size + 4])
        yield name, view[body : body + size], checksum
        position = body + size + 4
    raise ImageError(f"a PNG of more than {MAX_CHUNKS:,} chunks")


def _read_png_text(name: bytes, body: bytes) -> tuple[int | None, int | None]:
    """Orientations in a text chunk: of Exif as ImageMagick writes it, and of XMP."""
    keyword, _, text = body.partition(b"\0")
    if keyword == b"XML:com.adobe.xmp" and name == b"iTXt":
        return None, read_xmp_orientation(text)
    if keyword != b"Raw profile type exif":
        return None, None
    try:
        if name == b"zTXt":
            text = zlib.decompressobj().decompress(text[1:], MAX_TEXT)
        # a line break, the name, the size, then hexadecimal digits
        digits = b"".join(text.split(b"\n")[3:])
        return read_exif_orientation(bytes.fromhex(digits[: len(digits) & ~1].decode())), None
    except (ValueError, zlib.error):
        return None, None


def strip_webp(data: bytes) -> EncodedImage:
    """Keep a WebP's first frame: pixels and transparency."""
    kept: list[tuple[bytes, Bytes]] = []
    exif = xmp = None
    for name, body, cut in _webp_chunks(data):
        if name == b"EXIF" and exif is None:
            exif = read_exif_orientation(body[:MAX_TEXT])
        elif name == b"XMP " and xmp is None:
            xmp = read_xmp_orientation(body)
        # the first of each: an animation has many frames
        elif name in (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"):
            if name in [each for each, _ in kept]:
                continue
            if cut:
                raise ImageError("cut off: pixels are missing")
            kept.append((name, body))
    if not kept or kept[0][0] not in (b"VP8X", b"VP8 ", b"VP8L") or len(kept[0][1]) < 10:
        raise ImageError("cut off: the WebP ends before its pixels")
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
        orientation=exif or xmp or 1,
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


def strip_gif(data: bytes) -> EncodedImage:
    """Keep a GIF's first frame, with its transparent colour; drop comments and other frames."""
    if len(data) < 13:
        raise ImageError("cut off: the GIF ends in its header")
    start = 13 + _gif_palette(data[10])
    position, control, blocks = start, b"", MAX_BLOCKS
    while data[position : position + 1] == b"!":
        label, body = data[position + 1 : position + 2], position + 2
        position, blocks = _skip_blocks(data, body, blocks)
        # the transparent colour is in the last graphic control extension before the frame
        if label == b"\xf9" and position - body == 6:
            control = b"!\xf9" + data[body:position]
    frame = data[position : position + 10]
    if len(frame) < 10 or frame[:1] != b",":
        raise ImageError("cut off: the GIF ends before its pixels")
    # after the frame's palette and the byte with the size of its codes
    end, _ = _skip_blocks(data, position + 10 + _gif_palette(frame[9]) + 1, blocks)
    left, top, width, height = (
        int.from_bytes(frame[at : at + 2], "little") for at in range(1, 9, 2)
    )
    return EncodedImage(
        kind="GIF",
        data=data[:start] + control + data[position:end] + b";",
        # Pillow enlarges the canvas for a frame that leaves it
        width=max(int.from_bytes(data[6:8], "little"), left + width),
        height=max(int.from_bytes(data[8:10], "little"), top + height),
    )


def _gif_palette(flags: int) -> int:
    """Size in bytes of the palette that follows a header with these flags."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _skip_blocks(data: bytes, position: int, blocks: int) -> tuple[int, int]:
    """Position after a row of blocks and the empty one that ends it, and how many may follow."""
    size = len(data)
    while position < size and blocks > 0:
        blocks -= 1
        length = data[position]
        position += 1 + length
        if not length:
            break
    if blocks <= 0:
        raise ImageError(f"a GIF of more than {MAX_BLOCKS:,} blocks")
    return min(position, size), blocks


def check_bmp(data: bytes) -> EncodedImage:
    """Return a BMP as it is, unless it is compressed: that is rare, and slow in hostile files."""
    head = data[14:38]
    size = int.from_bytes(head[:4], "little")
    if len(head) < 24 or size < 12:
        raise ImageError("cut off: the BMP ends in its header")
    if size == 12:
        width, height = (int.from_bytes(head[at : at + 2], "little") for at in (4, 6))
    else:
        width, height = (int.from_bytes(head[at : at + 4], "little", signed=True) for at in (4, 8))
        if int.from_bytes(head[16:20], "little") not in (0, 3):
            raise ImageError("a compressed BMP: convert it, for example `magick IN OUT.png`")
    return EncodedImage(kind="BMP", data=data, width=max(width, 0), height=abs(height))


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
        raise ImageError("a corrupt AVIF: it does not say its size")
    width, height = max(sides, key=lambda each: each[0] * each[1])
    return EncodedImage(
        kind="AVIF", data=data[:start] + header + data[end:], width=width, height=height
    )


def _find_avif_header(data: bytes) -> tuple[int, int]:
    """Where the box `meta` lies, which describes the image."""
    position = 0
    for _ in range(100):
        size, name = (
            int.from_bytes(data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        if name == b"meta" and 8 <= size <= MAX_AVIF_HEADER and position + size <= len(data):
            return position, position + size
        if size < 8:
            break
        position += size
    raise ImageError(f"an AVIF without a description, or with more than {MAX_AVIF_HEADER:,} bytes")
