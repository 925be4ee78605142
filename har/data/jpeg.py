"""JPEG files: their segments, and a strict decoder.

Pillow and TensorFlow decode with libjpeg and ignore its warnings: where bytes are missing or
corrupt they return grey or garbled pixels. simplejpeg decodes with the same library, to the same
pixels, and reports the warnings.
"""

import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import simplejpeg

from har.data.encoded import (
    Bytes,
    EncodedImage,
    ImageError,
    corrupt,
    find_orientation,
    truncated,
)
from har.util.errors import first_line

# 60 MB of metadata in whole segments are a thousand; more cost time.
MAX_SEGMENTS = 10_000
# Between segments. Fill bytes 0xFF before a marker, and any other bytes, are skipped.
_MARKER = re.compile(rb"\xff([\x01-\xfe])")
# In a scan, 0xFF is followed by 0 where it is data, and D0 to D7 restart the decoder. Codes that
# have no meaning stay, for the decoder to complain about.
_AFTER_SCAN = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8), _SOI])
# tables: quantisation, Huffman, arithmetic conditioning, restart interval
_TABLES = frozenset([0xDB, 0xC4, 0xCC, 0xDD])
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HIERARCHICAL = frozenset([0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE, 0xDF])
_SEQUENTIAL = frozenset([0xC0, 0xC1, 0xC9])
_PROGRESSIVE = frozenset([0xC2, 0xCA])
_LOSSLESS = frozenset([0xC3, 0xCB])
# Baseline, extended and progressive with Huffman codes, which every libjpeg decodes.
_COMMON = frozenset([0xC0, 0xC1, 0xC2])
# The horizontal and vertical sampling of the components, as common encoders choose it.
_COMMON_SAMPLING = [bytes([first, 0x11, 0x11]) for first in (0x11, 0x21, 0x12, 0x22, 0x41, 0x14)]

_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
_COLOURS = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# What simplejpeg cannot decode though libjpeg can.
_LEFT_TO_PILLOW = re.compile("determine subsampling|color conversion|not supported|colorspace")
# Cameras fill up their last bytes: that is no damage.
_PADDING = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
MAX_PADDING = 2


@dataclass(kw_only=True)
class _Walk:
    """The state of a walk over a JPEG's segments."""

    kept: list[Bytes] = field(default_factory=list)
    frame: bytes = b""
    frame_marker: int = 0
    jfif: bool = False
    # the transform code of an Adobe segment
    adobe: int | None = None
    # the first of each
    exif: Bytes | None = None
    xmp: Bytes | None = None
    scans: int = 0
    # of each component, how many bits of each of its 64 coefficients are still to come
    missing_bits: dict[int, list[int]] = field(default_factory=dict)
    # False if a reader that is not as tolerant may fail, or read other pixels
    tidy: bool = True
    ended: bool = False


def strip_jpeg(data: bytes, start: int = 0) -> EncodedImage:
    """Reduce a JPEG that begins at `start` to tables, frame and scans, each of these unchanged.

    Metadata, junk between segments and what follows the end marker are dropped; an end marker that
    is missing is added.

    Raises:
        ImageError: the file ends before its first scan, lacks a scan, has too many segments, or is
            of a kind that no decoder here reads.
    """
    walk = _Walk(tidy=start == 0)
    view = memoryview(data)
    position, segments = start + 2, 0
    while found := _MARKER.search(data, position):
        walk.tidy &= found.start() == position
        marker, position = found[1][0], found.end()
        segments += 1
        if segments > MAX_SEGMENTS:
            raise ImageError(f"a JPEG of more than {MAX_SEGMENTS:,} segments")
        if marker == _EOI or (marker == _SOI and walk.scans):
            # another picture may begin where the end marker is missing
            walk.ended = marker == _EOI
            break
        if marker in _STANDALONE:
            walk.tidy = False
            continue
        end = position + int.from_bytes(view[position : position + 2])
        if end < position + 2 or end > len(data):
            break
        if marker == _SOS:
            after = _AFTER_SCAN.search(data, end)
            # without a marker after it, a last 0xFF is half of one
            stop = after.start() if after else len(data) - data.endswith(b"\xff")
            _add_scan(walk, view[position:end], view[end:stop])
            end = stop
        else:
            _add_segment(walk, marker, view[position:end])
        position = end
    return _finish(walk)


def _add_segment(walk: _Walk, marker: int, body: Bytes) -> None:
    """Note what a segment says; keep it if pixels depend on it. `body` begins with its length."""
    if marker in _HIERARCHICAL:
        raise ImageError("a hierarchical JPEG, which no common program reads")
    if marker in _FRAMES:
        if walk.frame:
            raise corrupt("two frame headers")
        walk.frame, walk.frame_marker = bytes(body), marker
        _check_frame(walk)
    if marker in _FRAMES or marker in _TABLES:
        walk.kept += [bytes([0xFF, marker]), body]
    elif walk.scans:
        return
    elif marker == 0xE0 and body[2:7] == b"JFIF\0" and len(body) >= 16:
        walk.jfif = True
    elif marker == 0xEE and body[2:7] == b"Adobe" and len(body) >= 14:
        walk.adobe = body[13]
    elif marker == 0xE1 and walk.exif is None and body[2:8] == b"Exif\0\0":
        walk.exif = body[2:]
    elif marker == 0xE1 and walk.xmp is None and body[2:30] == b"http://ns.adobe.com/xap/1.0/":
        walk.xmp = body


def _check_frame(walk: _Walk) -> None:
    frame = walk.frame
    if len(frame) < 8 or len(frame) != 8 + 3 * frame[7]:
        raise corrupt("its frame header is too short")
    if frame[2] != 8:
        raise ImageError(f"a JPEG of {frame[2]} bits a colour: convert it to 8 bits")
    if frame[7] not in _COLOURS:
        raise ImageError(f"a JPEG of {frame[7]} colour components: 1, 3 or 4 are read")
    if not any(frame[3:5]) or not any(frame[5:7]):
        raise ImageError("a JPEG of no pixels: its height or width is 0")
    walk.missing_bits = {component: [1] * 64 for component in frame[8::3]}


def _add_scan(walk: _Walk, header: Bytes, pixels: Bytes) -> None:
    """Keep a scan, and note which coefficients it brings."""
    count = header[2] if len(header) > 2 else 0
    if not walk.frame or len(header) != 6 + 2 * count:
        raise corrupt("a scan's header is wrong")
    first, last, bits = header[-3:]
    if walk.frame_marker in _SEQUENTIAL and (first, last, bits) != (0, 63, 0):
        # a sequential scan has all coefficients, but some encoders write other numbers here
        walk.tidy, first, last, bits = False, 0, 63, 0
        header = bytes(header[:-3]) + b"\0\x3f\0"
    if walk.frame_marker in _LOSSLESS:
        # it has no coefficients: these numbers mean something else
        first, last, bits = 0, 63, 0
    for component in header[3 : 3 + 2 * count : 2]:
        if component in walk.missing_bits and first <= last <= 63:
            walk.missing_bits[component][first : last + 1] = [bits & 15] * (last + 1 - first)
    walk.scans += 1
    walk.kept += [b"\xff\xda", header, pixels]


def _finish(walk: _Walk) -> EncodedImage:
    if not walk.scans:
        raise truncated("the JPEG ends before them")
    if any(any(bits) for bits in walk.missing_bits.values()):
        raise truncated("the JPEG lacks some of its scans")
    frame = walk.frame
    head = [b"\xff\xd8", _JFIF if walk.jfif else b""]
    if walk.adobe is not None:
        head.append(_ADOBE + bytes([walk.adobe]))
    orientation = find_orientation(walk.exif, walk.xmp)
    return EncodedImage(
        kind="JPEG",
        data=b"".join([*head, *walk.kept, b"\xff\xd9"]),
        width=int.from_bytes(frame[5:7]),
        height=int.from_bytes(frame[3:5]),
        orientation=orientation,
        plain_jpeg=walk.tidy and walk.ended and orientation == 1 and _is_common(walk),
        components=frame[7],
        scans=walk.scans,
        extra_bytes=_count_extra_bytes(walk),
    )


def _count_extra_bytes(walk: _Walk) -> float:
    """Memory for each pixel: its coefficients, if they come in several scans, and CMYK levels."""
    sampling = [(each >> 4, each & 15) for each in walk.frame[9::3]]
    most = max(across for across, _ in sampling) * max(down for _, down in sampling)
    samples = sum(across * down for across, down in sampling) / max(most, 1)
    several = walk.scans > 1 or walk.frame_marker in _PROGRESSIVE
    return 2 * samples * several + (5 if walk.frame[7] == 4 else 0)


def _is_common(walk: _Walk) -> bool:
    """Return True if the pixels and their colours are encoded as most JPEGs are."""
    frame = walk.frame
    if walk.frame_marker not in _COMMON:
        return False
    if frame[7] == 1:
        return walk.adobe is None
    if not walk.jfif and walk.adobe is None and frame[8::3] != b"\1\2\3":
        return False
    return walk.adobe in (None, 1) and frame[9::3] in _COMMON_SAMPLING


def decode_jpeg(image: EncodedImage) -> npt.NDArray[np.uint8] | None:
    """Decode what `strip_jpeg` returned to (height, width, 1 or 3 or 4) grey, RGB or CMYK.

    The CMYK levels are inverted, as in files. None for the rare sorts that simplejpeg cannot
    decode and Pillow may.

    Raises:
        ImageError: bytes are missing or corrupt.
    """
    data = image.data
    while True:
        try:
            return simplejpeg.decode_jpeg(data, colorspace=_COLOURS[image.components])
        except ValueError as error:
            if _LEFT_TO_PILLOW.search(str(error)):
                return None
            shorter = _drop_padding(data, str(error))
            if shorter is None:
                reason = first_line(error).removeprefix("Corrupt JPEG data: ")
                cut = "premature end" in reason.lower()
                raise (truncated(reason) if cut else corrupt(reason)) from error
            data = shorter


def _drop_padding(data: bytes, message: str) -> bytes | None:
    """Remove the last bytes of the last scan if they are only padding; None if they are not."""
    found = _PADDING.search(message)
    if found is None:
        return None
    size = int(found[1])
    padding = data[-2 - size : -2]
    if size > MAX_PADDING and padding.strip(b"\0") and padding.strip(b"\xff"):
        return None
    return data[: -2 - size] + data[-2:]
