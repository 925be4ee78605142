"""GIF, BMP and TIFF files reduced to their first image, as `har.data.chunks` does with others."""

import re
from dataclasses import dataclass

from har.data.encoded import EncodedImage, ImageError, corrupt, truncated

# A GIF holds at most 255 bytes in a block: 60 MB in full blocks are 235,000.
MAX_BLOCKS = 250_000
_ZEROS = re.compile(rb"\0*")
# Pillow handles strips one by one: 20,000 take half a second.
MAX_STRIPS = 20_000
# Other values: a palette of 16 bits a colour has this many bytes.
MAX_VALUE = 3 * 65_536 * 2
# The decoder makes room for a whole tile, however small the image is.
MAX_TILE_PIXELS = 16_000_000
COMPRESSIONS = {1: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits"}
_TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 8: 2, 9: 4}

_REDUCED, _WIDTH, _HEIGHT, _COMPRESSION, _ORIENTATION = 254, 256, 257, 259, 274
_STRIPS, _STRIP_SIZES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 273, 279, *range(322, 326)
_DNG_VERSION = 50706
# Besides those: bits, photometric, fill order, samples, rows per strip, planar configuration,
# predictor, palette, extra samples, sample format.
_KEPT = frozenset(
    [
        *[_WIDTH, _HEIGHT, _COMPRESSION, _STRIPS, _STRIP_SIZES],
        *[_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES],
        *[258, 262, 266, 277, 278, 284, 317, 320, 338, 339],
    ]
)


def strip_gif(data: bytes) -> EncodedImage:
    """Keep a GIF's first frame, with its transparent colour; drop comments and other frames."""
    if len(data) < 13:
        raise truncated("the GIF ends in its header")
    start = 13 + _gif_palette(data[10])
    position, control, blocks = _skip_zeros(data, start), b"", MAX_BLOCKS
    while data[position : position + 1] == b"!":
        label, body = data[position + 1 : position + 2], position + 2
        position, blocks = _skip_blocks(data, body, blocks)
        # the transparent colour is in the last graphic control extension before the frame
        if label == b"\xf9" and position - body == 6:
            control = b"!\xf9" + data[body:position]
        position = _skip_zeros(data, position)
    frame = data[position : position + 10]
    if len(frame) < 10 or frame[:1] != b",":
        raise truncated("the GIF ends before them")
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


def _skip_zeros(data: bytes, position: int) -> int:
    """Position of the next byte that is not zero; some programs write empty blocks too many."""
    found = _ZEROS.match(data, position)
    return found.end() if found else position


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
        raise truncated("the BMP ends in its header")
    if size == 12:
        width, height = (int.from_bytes(head[at : at + 2], "little") for at in (4, 6))
    else:
        width, height = (int.from_bytes(head[at : at + 4], "little", signed=True) for at in (4, 8))
        if int.from_bytes(head[16:20], "little") not in (0, 3):
            raise ImageError("a compressed BMP: convert it, for example `magick IN OUT.png`")
    return EncodedImage(kind="BMP", data=data, width=max(width, 0), height=abs(height))


@dataclass(frozen=True, kw_only=True)
class _Tag:
    # 12 bytes: number, type, count, and the values or where they are
    entry: bytes
    # 0 if the entry has no room for the values
    value: int


def strip_tiff(data: bytes) -> EncodedImage:
    """Give a TIFF a table of its first image's pixel tags only, after the bytes it has.

    Raises:
        ImageError: the compression is rare, or the first image is only a preview, as in the raw
            photos of cameras.
    """
    order = "little" if data[:2] == b"II" else "big"
    tags = _read_tags(data, order)
    values = {number: tag.value for number, tag in tags.items()}
    if _DNG_VERSION in tags or values.get(_REDUCED, 0) & 1:
        raise ImageError("a camera's raw photo: export it as JPEG")
    compression = values.get(_COMPRESSION, 1)
    if compression not in COMPRESSIONS:
        raise ImageError(
            f"a TIFF of a rare compression ({compression}): convert it, for example"
            " `magick IN OUT.png`"
        )
    if not {_WIDTH, _HEIGHT} <= set(tags) or not {_STRIPS, _TILES} & set(tags):
        raise corrupt("it does not say its size, or where its pixels are")
    if values.get(_TILE_WIDTH, 0) * values.get(_TILE_HEIGHT, 0) > MAX_TILE_PIXELS:
        raise ImageError(f"a TIFF with tiles of more than {MAX_TILE_PIXELS:,} pixels")
    return EncodedImage(
        kind="TIFF",
        data=_write(data, order, {number: tags[number] for number in sorted(_KEPT & set(tags))}),
        width=values[_WIDTH],
        height=values[_HEIGHT],
        orientation=values.get(_ORIENTATION, 1),
    )


def _read_tags(data: bytes, order: str) -> dict[int, _Tag]:
    """Read the first table of tags; drop those whose values lie outside the file or are too long.

    A table has at most 65,535 entries.
    """

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]

    table = number(4, 4)
    tags: dict[int, _Tag] = {}
    for at in range(table + 2, table + 2 + 12 * number(table, 2), 12):
        tag, kind, count = number(at, 2), number(at + 2, 2), number(at + 4, 4)
        if tag not in _KEPT and tag not in (_REDUCED, _ORIENTATION, _DNG_VERSION):
            continue
        size = _TYPE_SIZES.get(kind, 0)
        long = size * count > 4
        end = number(at + 8, 4) + size * count if long else 0
        value = number(at + 8, size) if not long else 0
        if at + 12 > len(data) or end > len(data):
            raise truncated("the TIFF ends before their description")
        if tag in (_STRIPS, _STRIP_SIZES, _TILES, _TILE_SIZES) and count > MAX_STRIPS:
            raise ImageError(f"a TIFF of more than {MAX_STRIPS:,} strips or tiles")
        if size and size * count <= MAX_VALUE:
            tags.setdefault(tag, _Tag(entry=data[at : at + 12], value=value))
    return tags


def _write(data: bytes, order: str, tags: dict[int, _Tag]) -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, order)  # type: ignore[arg-type]

    # a table begins at an even position, and no other follows it
    padding = b"\0" * (len(data) % 2)
    table = number(len(tags), 2) + b"".join(tag.entry for tag in tags.values()) + number(0, 4)
    return data[:4] + number(len(data) + len(padding), 4) + data[8:] + padding + table
