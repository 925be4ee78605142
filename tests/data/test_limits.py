"""Files that strangers made to cost time and memory: read or refused, soon and in bounds."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from har.data.images import ImageError, decode, open_image
from har.data.kinds import READABLE
from har.data.limits import SERVING_LIMITS, TRAINING_LIMITS, Limits
from tests.data.making import (
    PNG_START,
    chunk,
    encode,
    exif,
    gradient,
    png,
    riff,
    segment,
    tiff,
    webp_header,
    webp_pixels,
    with_segments,
)

PHOTO = gradient()
FLAT_SIDE = 5_000
# CPU time on a slow machine; most take a tenth.
MAX_SECONDS = 1.5
# The largest images here have 25 megapixels: 75 MB of pixels, 60 MB of file, 350 MB more.
MAX_MEGABYTES = 500


def jpeg() -> bytes:
    return encode(PHOTO)


def flat(kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    return encode(Image.new(mode, (FLAT_SIDE, FLAT_SIDE)), kind, **options)


def more_scans(count: int, image: Image.Image) -> bytes:
    """A progressive JPEG whose first scan comes again and again."""
    data = encode(image, progressive=True, subsampling="4:4:4")
    start = data.index(b"\xff\xda")
    end = data.index(b"\xff\xc4", start)
    return data[:end] + data[start:end] * count + data[end:]


def progressive_header(width: int, height: int) -> bytes:
    """A small progressive JPEG that says it is as large as this."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), progressive=True, subsampling="4:4:4"))
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def with_chunks(name: bytes, body: bytes, count: int) -> Callable[[], bytes]:
    return lambda: png(PHOTO, chunk(name, body) * count)


def webp_with(name: bytes, body: bytes, count: int) -> Callable[[], bytes]:
    more = [(name, body)] * count
    return lambda: riff(webp_header(PHOTO, 0x2C), *more[:1], webp_pixels(PHOTO), *more[1:])


def inflated_exif() -> bytes:
    """Exif data of the highest number of tags, in hexadecimal digits, compressed."""
    profile = exif(*[(0x9999, 7, 2**31, b"\xff" * 4)] * 60_000)
    return b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + profile.hex().encode())


def gif_with(extension: bytes, count: int) -> bytes:
    data = encode(PHOTO.quantize(8), "GIF")
    at = data.index(b",\0\0\0\0")
    return data[:at] + extension * count + data[at:]


def one_byte_blocks() -> bytes:
    data = encode(PHOTO.quantize(8), "GIF")
    at = data.index(b",\0\0\0\0") + 11
    return data[:at] + b"\1\0" * 1_000_000


def avif_with_items(count: int) -> bytes:
    """An AVIF whose list of items is long."""
    data = encode(PHOTO, "AVIF")
    at = data.index(b"meta") - 4
    size = int.from_bytes(data[at : at + 4])
    item = b"\0\0\0\x15infe\2\0\0\1\0\x09\0\0Exif\0"
    return data[: at + size] + item * count + data[at + size :]


def repeated_extents() -> bytes:
    """An AVIF whose pixels are the same bytes, thousands of times: gigabytes."""
    data = encode(PHOTO, "AVIF")
    at = data.index(b"iloc")
    size = int.from_bytes(data[at - 4 : at])
    meta = data.index(b"meta") - 4
    meta_size = int.from_bytes(data[meta : meta + 4])
    count = 20_000
    offset = (meta + meta_size + 200_000).to_bytes(4)
    extents = (offset + (4_000_000).to_bytes(4)) * count
    body = b"\0\0\0\0\x44\0\0\1\0\1\0\0" + count.to_bytes(2) + extents
    box = (len(body) + 8).to_bytes(4) + b"iloc" + body
    longer = meta_size + len(box) - size
    header = (
        longer.to_bytes(4) + data[meta + 4 : at - 4] + box + data[at - 4 + size : meta + meta_size]
    )
    return data[:meta] + header + data[meta + meta_size :] + bytes(8_000_000)


# name: (file, what comes out: the image, or the reason against it)
READ = "read"
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "small Exif segments": (
        lambda: with_segments(jpeg(), segment(0xE1, b"Exif\0\0" + bytes(6)) * 1_600_000),
        "more than 10,000 segments",
    ),
    "Exif segments, few enough": (
        lambda: with_segments(jpeg(), segment(0xE1, b"Exif\0\0" + bytes(2_000)) * 9_900),
        READ,
    ),
    "Exif of many tags, many times": (
        lambda: with_segments(
            jpeg(), segment(0xE1, b"Exif\0\0" + exif(*[(9, 7, 2**31, b"\xff" * 4)] * 5_000)) * 900
        ),
        READ,
    ),
    "colour profiles": (
        lambda: with_segments(
            jpeg(),
            *[
                segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 175]) + bytes(60_000))
                for i in range(175)
            ],
        ),
        READ,
    ),
    "Photoshop blocks": (
        lambda: with_segments(
            jpeg(), segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_000) * 400
        ),
        READ,
    ),
    "comments": (
        lambda: with_segments(jpeg(), segment(0xFE, b"") * 5_000_000),
        "more than 10,000 segments",
    ),
    "FF bytes": (lambda: b"\xff\xd8" + b"\xff" * 25_000_000, "truncated"),
    "FF 00 pairs": (lambda: jpeg()[:2] + b"\xff\0" * 12_000_000 + jpeg()[2:], READ + "|corrupt"),
    "markers alone": (
        lambda: b"\xff\xd8\xff\xe0\0\2" + b"\xff\x01" * 12_000_000,
        "10,000 segments",
    ),
    "restarts": (lambda: jpeg()[:-2] + b"\xff\xd0" * 12_000_000, "corrupt|truncated|" + READ),
    "stuffed scan": (lambda: jpeg()[:-2] + b"\xff\0" * 12_000_000, "corrupt|truncated"),
    "Huffman tables": (
        lambda: with_segments(
            jpeg(), *[segment(0xC4, b"\0" + bytes([0, 1] + [0] * 14) + b"\0")] * 9_900
        ),
        READ,
    ),
    "99 scans of 25 megapixels": (
        lambda: more_scans(99, Image.new("RGB", (FLAT_SIDE, FLAT_SIDE))),
        "109 scans, more than 40",
    ),
    "scans, few enough": (
        lambda: more_scans(29, Image.new("RGB", (FLAT_SIDE, FLAT_SIDE))),
        "corrupt|" + READ,
    ),
    "progressive, too large": (
        lambda: progressive_header(9_000, 9_000),
        "more than 58,333,333 in a progressive",
    ),
    "empty pixel chunks, a million": (
        with_chunks(b"IDAT", b"", 1_000_000),
        "more than 50,000 chunks",
    ),
    "empty pixel chunks, few enough": (with_chunks(b"IDAT", b"", 49_000), READ),
    "inflated Exif in PNG texts": (with_chunks(b"zTXt", inflated_exif(), 5_000), READ),
    "inflated texts": (
        with_chunks(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)), 100),
        READ,
    ),
    "inflated international texts": (
        with_chunks(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(50_000_000)), 100),
        READ,
    ),
    "inflated colour profiles": (
        with_chunks(b"iCCP", b"p\0\0" + zlib.compress(bytes(50_000_000)), 100),
        READ,
    ),
    "Exif chunks": (
        with_chunks(b"eXIf", exif(*[(9, 7, 2**31, b"\xff" * 4)] * 60_000), 30),
        READ,
    ),
    "pixels that inflate on": (
        lambda: (
            PNG_START
            + png(PHOTO)[8:33]
            + chunk(b"IDAT", zlib.compress(bytes(200_000_000)))
            + chunk(b"IEND", b"")
        ),
        READ,
    ),
    "16 bits and transparency": (lambda: flat("PNG", "LA"), READ),
    "one bit": (lambda: flat("PNG", "1"), READ),
    "WebP chunks": (webp_with(b"JUNK", b"", 1_000_000), "more than 50,000 chunks"),
    "WebP Exif chunks": (
        webp_with(b"EXIF", exif(*[(9, 7, 2**31, b"\xff" * 4)] * 60_000), 30),
        READ,
    ),
    "WebP of 25 megapixels": (lambda: flat("WEBP", "RGBA", lossless=True, method=0), READ),
    "GIF comments": (lambda: gif_with(b"!\xfe\1a\0", 1_000_000), "more than 250,000 blocks"),
    "GIF comments, few enough": (lambda: gif_with(b"!\xfe\1a\0", 120_000), READ),
    "GIF controls": (lambda: gif_with(b"!\xf9\4\0\0\0\0\0", 120_000), READ),
    "GIF frames": (
        lambda: encode(PHOTO.quantize(8), "GIF")[:-1] + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0" * 1_000_000,
        READ,
    ),
    "GIF of small blocks": (one_byte_blocks, "more than 250,000 blocks"),
    "BMP palette": (lambda: flat("BMP", "P"), READ),
    "BMP of runs": (
        lambda: (
            (b := encode(PHOTO.quantize(8), "BMP"))[:30] + b"\1" + b[31:] + b"\0\0" * 10_000_000
        ),
        "compressed BMP",
    ),
    "TIFF tags": (lambda: tiff(PHOTO, *[(51_000 + i, 4, 1, 0) for i in range(12_000)]), READ),
    "TIFF strips": (
        lambda: tiff(gradient(400, 400), (273, 4, 100_000, 8), (279, 4, 100_000, 8)),
        "more than 20,000 strips",
    ),
    "TIFF strips, few enough": (lambda: tiff(Image.new("RGB", (9, 19_999)), strips=19_999), READ),
    "TIFF tile": (
        lambda: tiff(
            PHOTO, (322, 3, 1, 60_000), (323, 3, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 9)
        ),
        "tiles of more than",
    ),
    "TIFF of long values": (
        lambda: tiff(PHOTO, *[(34_000 + i, 7, 2**30, 8) for i in range(99)]),
        READ,
    ),
    "TIFF of a million samples": (
        lambda: tiff(PHOTO, (277, 4, 1, 1_000_000)),
        "Pillow cannot read its header",
    ),
}
if "AVIF" in READABLE:
    ATTACKS |= {
        "AVIF items": (lambda: avif_with_items(20_000), READ + "|cannot be decoded"),
        "AVIF extents": (repeated_extents, "Pillow cannot read its header"),
        "AVIF of 25 megapixels": (lambda: flat("AVIF", "RGBA", speed=10), READ),
    }

# Prints seconds, what came out, and the process' peak of memory so far in MB, for each file.
PROGRAM = """
import json, re, sys, time
from pathlib import Path
from har.data.images import ImageError, decode, read_image

def peak():
    return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

start = peak()
for path in map(Path, sys.argv[1:]):
    began = time.process_time()
    try:
        shape = decode(read_image(path), "bicubic", 32).shape
        outcome = "read" if shape == (32, 32, 3) else str(shape)
    except ImageError as error:
        outcome = str(error)
    seconds = time.process_time() - began
    print(json.dumps([path.stem, seconds, peak() - start, outcome]), flush=True)
"""


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float, str]]:
    """Seconds, megabytes and outcome of each attack, all in one process."""
    folder = tmp_path_factory.mktemp("attacks")
    files = []
    for name, (build, _) in ATTACKS.items():
        files.append(folder / f"{name}.bin")
        files[-1].write_bytes(build())
    command = [sys.executable, "-c", PROGRAM, *map(str, files)]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=300,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    for file in files:
        os.truncate(file, 0)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (seconds, peak, outcome) for name, seconds, peak, outcome in rows}


@linux
@pytest.mark.parametrize("name", ATTACKS)
def test_no_file_costs_more_than_its_pixels(
    name: str, outcomes: dict[str, tuple[float, float, str]]
) -> None:
    seconds, megabytes, outcome = outcomes[name]
    assert any(part in outcome for part in ATTACKS[name][1].split("|")), outcome
    assert seconds < MAX_SECONDS
    # the peak of this file and all before it
    assert megabytes < MAX_MEGABYTES


def test_limits_are_those_of_the_purpose() -> None:
    large = encode(Image.new("L", (8_000, 7_000)))
    assert decode(large, "bicubic", 32).shape == (32, 32, 3)
    with pytest.raises(ImageError, match="8000x7000 pixels, more than 50,000,000"):
        decode(large, "bicubic", 32, SERVING_LIMITS)
    with pytest.raises(ImageError, match=f"{len(large):,} bytes, more than 1,000"):
        open_image(large, Limits(bytes=1_000, pixels=TRAINING_LIMITS.pixels))
