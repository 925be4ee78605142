"""Decoding: every loader, evaluation and serving see the same pixels."""

import io
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import simplejpeg
import tensorflow as tf
from PIL import Image

from har.data import images
from har.data.images import (
    RESIZERS,
    ImageError,
    bilinear_in_graph,
    decode,
    decode_in_graph,
    decode_rgb,
    is_plain_jpeg,
    large_images_in_turn,
    open_image,
    resize_bilinear,
)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Smooth shapes with edges and noise: JPEG and resizing have something to do."""
    y, x = np.mgrid[0:97, 0:131]
    rng = np.random.default_rng(0)
    channels = [128 + 90 * np.sin(x / 9), 2 * y, 128 + 90 * np.cos((x + y) / 5)]
    pixels = np.stack(channels, -1) + rng.normal(0, 8, (97, 131, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode_in_pipeline(file: Path, plain: bool, resize: str) -> np.ndarray:
    row = tf.data.Dataset.from_tensors((str(file), plain))
    (image,) = row.map(lambda path, is_plain: decode_in_graph(path, is_plain, resize, 32))
    return image.numpy()


def test_bicubic_is_pillows_default_resize(photo: Image.Image) -> None:
    data = encode(photo)
    expected = np.asarray(Image.open(io.BytesIO(data)).resize((40, 40)))
    np.testing.assert_array_equal(decode(data, "bicubic", 40), expected)


def test_bilinear_is_tensorflows_resize_rounded(photo: Image.Image) -> None:
    data = encode(photo)
    pixels = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE")
    expected = tf.image.resize(pixels, (40, 40)).numpy()
    np.testing.assert_allclose(decode(data, "bilinear", 40), expected, atol=0.5)


@pytest.mark.parametrize("size", [32, 97, 131, 200])
@pytest.mark.parametrize("shape", [(97, 131), (97, 97), (1, 50), (400, 3), (1, 1)])
def test_bilinear_is_the_same_to_the_bit_in_a_pipeline(shape: tuple[int, int], size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    np.testing.assert_array_equal(resize_bilinear(image, size), bilinear_in_graph(image, size))


def test_the_two_resizes_differ(photo: Image.Image) -> None:
    data = encode(photo)
    assert (decode(data, "bicubic", 40) != decode(data, "bilinear", 40)).mean() > 0.5


@pytest.mark.parametrize("resize", RESIZERS)
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_graph_and_python_decode_alike(
    photo: Image.Image, tmp_path: Path, resize: str, quality: int, subsampling: str, mode: str
) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(encode(photo.convert(mode), quality=quality, subsampling=subsampling))
    plain = is_plain_jpeg(open_image(file.read_bytes()))
    assert plain
    found = decode_in_pipeline(file, plain, resize)
    np.testing.assert_array_equal(found, decode(file.read_bytes(), resize, 32))


def test_graph_takes_pillows_way_for_other_kinds(photo: Image.Image, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    photo.save(file)
    found = decode_in_pipeline(file, False, "bilinear")
    np.testing.assert_array_equal(found, decode(file.read_bytes(), "bilinear", 32))


RED, GREEN, BLUE = (220, 30, 40), (20, 200, 60), (30, 60, 230)


def chequers(mode: str = "RGB") -> Image.Image:
    """Red and green halves, blue below: any mix-up of channels, sides or rows shows."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:], pixels[16:] = RED, GREEN, BLUE
    return Image.fromarray(pixels).convert(mode)


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").convert("RGB"))


def half_clear(mode: str) -> Image.Image:
    """`chequers`, of which the right half is wholly transparent."""
    image = chequers("RGBA")
    image.paste((1, 2, 3, 0), (16, 0, 32, 24))
    return image.convert(mode)


def on_white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB")).copy()
    pixels[:, 16:] = 255
    return pixels


def palette_with_hole() -> bytes:
    """A palette image, one of whose colours is transparent."""
    image = chequers().quantize(8)
    clear = image.getpixel((31, 0))
    return encode(image, "PNG", transparency=clear)


def with_hole() -> np.ndarray:
    pixels = np.asarray(chequers()).copy()
    pixels[:16, 16:] = 255
    return pixels


def png_16_bit_rgb() -> bytes:
    """Pillow writes none: each level twice, so that 65535 stands for 255."""
    pixels = np.asarray(chequers()).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def frames(kind: str, **options: object) -> bytes:
    """Several pictures, the first of which is `chequers`."""
    others = [Image.new("RGB", (32, 24), colour) for colour in ("white", "black")]
    return encode(chequers(), kind, save_all=True, append_images=others, **options)


AREAS = [np.s_[2:14, 2:14], np.s_[2:14, 18:30], np.s_[18:22, 2:30]]


# What is read, what it must look like, and how far a lossy format may be from that.
KINDS: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray], int]] = {
    "jpeg": (lambda: encode(chequers(), quality=95), lambda: np.asarray(chequers()), 8),
    "jpeg progressive": (
        lambda: encode(chequers(), quality=95, progressive=True),
        lambda: np.asarray(chequers()),
        8,
    ),
    "jpeg grey": (lambda: encode(chequers("L"), quality=95), lambda: grey(chequers()), 8),
    "jpeg cmyk": (
        lambda: encode(chequers("CMYK"), quality=95),
        lambda: np.asarray(chequers()),
        8,
    ),
    "jpegs in one": (lambda: frames("MPO", quality=95), lambda: np.asarray(chequers()), 8),
    "png": (lambda: encode(chequers(), "PNG"), lambda: np.asarray(chequers()), 0),
    "png grey": (lambda: encode(chequers("L"), "PNG"), lambda: grey(chequers()), 0),
    "png two colours": (
        lambda: encode(chequers("1"), "PNG"),
        lambda: np.asarray(chequers("1").convert("RGB")),
        0,
    ),
    "png palette": (
        lambda: encode(chequers().quantize(8), "PNG"),
        lambda: np.asarray(chequers()),
        0,
    ),
    "png palette with a hole": (palette_with_hole, with_hole, 0),
    "png alpha": (
        lambda: encode(half_clear("RGBA"), "PNG"),
        lambda: on_white(chequers()),
        0,
    ),
    "png grey alpha": (
        lambda: encode(half_clear("LA"), "PNG"),
        lambda: on_white(chequers("L")),
        0,
    ),
    "png 16 bit": (png_16_bit_rgb, lambda: np.asarray(chequers()), 0),
    "png 16 bit grey": (
        lambda: encode(Image.fromarray(np.asarray(chequers("L")).astype(np.uint16) * 257), "PNG"),
        lambda: grey(chequers()),
        0,
    ),
    "png animated": (lambda: frames("PNG"), lambda: np.asarray(chequers()), 0),
    "webp": (lambda: encode(chequers(), "WEBP", lossless=True), lambda: np.asarray(chequers()), 0),
    "webp lossy": (
        lambda: encode(chequers(), "WEBP", quality=95),
        lambda: np.asarray(chequers()),
        8,
    ),
    "webp alpha": (
        lambda: encode(half_clear("RGBA"), "WEBP", lossless=True),
        lambda: on_white(chequers()),
        0,
    ),
    "webp animated": (
        lambda: frames("WEBP", lossless=True),
        lambda: np.asarray(chequers()),
        0,
    ),
    "gif": (lambda: encode(chequers().quantize(8), "GIF"), lambda: np.asarray(chequers()), 0),
    "gif animated": (lambda: frames("GIF"), lambda: np.asarray(chequers()), 0),
    "bmp": (lambda: encode(chequers(), "BMP"), lambda: np.asarray(chequers()), 0),
    "bmp grey": (lambda: encode(chequers("L"), "BMP"), lambda: grey(chequers()), 0),
    "bmp palette": (
        lambda: encode(chequers().quantize(8), "BMP"),
        lambda: np.asarray(chequers()),
        0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(kind: str) -> None:
    build, expected, tolerance = KINDS[kind]
    image = decode_rgb(build())
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8
    # a lossy format smears the edges between the colours
    for area in AREAS if tolerance else [np.s_[:, :]]:
        np.testing.assert_allclose(image[area].astype(int), expected()[area], atol=tolerance)


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90,
    # no orientation that there is
    9: lambda stored: stored,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_orientation_is_honoured(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}[kind]
    stored = np.asarray(Image.open(io.BytesIO(encode(chequers(), kind, **options))).convert("RGB"))
    found = decode_rgb(encode(chequers(), kind, exif=exif, **options))
    np.testing.assert_array_equal(found, UPRIGHT[orientation](stored))


def test_cmyk_and_orientation_are_not_plain(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(photo, exif=exif)
    assert not is_plain_jpeg(open_image(turned))
    assert not is_plain_jpeg(open_image(encode(photo.convert("CMYK"))))
    assert decode_rgb(turned).shape == (131, 97, 3)
    assert decode_rgb(encode(photo.convert("CMYK"))).shape == (97, 131, 3)


def test_16_bit_greys_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    image = decode_rgb(encode(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(image[0, :, 0], np.arange(256))


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (decode_rgb(encode(clear, "PNG")) == 255).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes"),
        (b"hello", "not an image"),
        (b"\xff\xd8\xff\xe0", "truncated"),
        (b"%PDF-1.4", "a PDF, not an image"),
    ],
)
def test_what_is_no_image_says_so(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_rgb(data)


def test_truncated_image_says_so(photo: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"cannot be decoded.*truncated"):
        decode_rgb(encode(photo)[:900])


def patched(data: bytes, at: int, *, sides: bytes) -> bytes:
    """The same file that announces other sides."""
    return data[:at] + sides + data[at + len(sides) :]


def png_of(width: int, height: int) -> bytes:
    data = patched(encode(chequers(), "PNG"), 16, sides=struct.pack(">II", width, height))
    return patched(data, 29, sides=struct.pack(">I", zlib.crc32(data[12:29])))


def jpeg_of(width: int, height: int, **options: object) -> bytes:
    data = encode(chequers(), **options)
    frame = b"\xff\xc2" if "progressive" in options else b"\xff\xc0"
    return patched(data, data.index(frame) + 5, sides=struct.pack(">HH", height, width))


def gif_of(width: int, height: int, *, frame: bool) -> bytes:
    data = encode(chequers(), "GIF")
    at = data.index(b"\x2c\0\0\0\0") + 5 if frame else 6
    return patched(data, at, sides=struct.pack("<HH", width, height))


def webp_of(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return patched(frames("WEBP"), 24, sides=sides)


def bmp_of(width: int, height: int) -> bytes:
    return patched(encode(chequers(), "BMP"), 18, sides=struct.pack("<ii", width, height))


def many_scans() -> bytes:
    data = encode(chequers(), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 100 + data[-2:]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a real one": (lambda: encode(Image.new("1", (10_000, 10_000)), "PNG"), "10000x10000 pixels"),
    "png": (lambda: png_of(60_000, 60_000), "60000x60000 pixels, more than 40,000,000"),
    "png, just over": (lambda: png_of(10_000, 4_001), "10000x4001 pixels, more than 40,000,000"),
    "png, thin": (lambda: png_of(1, 39_000_000), "a side longer than 65,535"),
    "jpeg": (lambda: jpeg_of(65_535, 65_535), "65535x65535 pixels, more than 125,000,000"),
    "jpeg of many scans": (many_scans, "110 scans, more than 100"),
    "jpeg, progressive": (
        lambda: jpeg_of(65_000, 1_900, progressive=True, subsampling="4:4:4"),
        "65000x1900 pixels, more than 58,333,333 in a progressive",
    ),
    "gif canvas": (lambda: gif_of(65_535, 65_535, frame=False), "65535x65535 pixels"),
    "gif frame": (lambda: gif_of(9_000, 9_000, frame=True), "9000x9000 pixels"),
    "webp canvas": (lambda: webp_of(8_000, 8_000), "8000x8000 pixels"),
    "webp canvas, larger": (lambda: webp_of(65_535, 65_535), "pixels, more than 25,000,000"),
    "bmp": (lambda: bmp_of(2**31 - 1, 2**31 - 1), "pixels, more than 50,000,000"),
    "too many bytes": (lambda: encode(chequers()) + bytes(60_000_000), "more than 60,000,000"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_unread(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, message = BOMBS[bomb]
    data = build()

    def fail(*_: object, **__: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    with pytest.raises(ImageError, match=message):
        decode_rgb(data)


@pytest.mark.parametrize("sides", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("build", [png_of, jpeg_of, bmp_of])
def test_no_pixels_at_all_are_refused(build: Callable, sides: tuple[int, int]) -> None:
    with pytest.raises(ImageError):
        decode(build(*sides), "bilinear", 32)


def test_preprocess_input_is_the_identity() -> None:
    """The notebooks' v2 to v4 call it; this project does not, because it does nothing."""
    image = np.random.default_rng(0).uniform(0, 255, (1, 9, 9, 3)).astype(np.float32)
    same = keras.applications.efficientnet.preprocess_input(image.copy())
    np.testing.assert_array_equal(same, image)


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(chequers())
    monkeypatch.setattr(images, "LARGE_PIXELS", 32 * 24 - 1)
    running: list[int] = []
    most: list[int] = []

    def resize(pixels: np.ndarray, size: int) -> np.ndarray:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return pixels[:size, :size]

    monkeypatch.setitem(images.RESIZERS, "slow", resize)
    threads = [threading.Thread(target=decode, args=(jpeg, "slow", 8)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    with large_images_in_turn(open_image(encode(Image.new("L", (8, 8))))):
        assert not running
