"""Decoding: every loader, evaluation and serving see the same pixels."""

import io
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from har.images import (
    RESIZERS,
    ImageError,
    decode,
    decode_in_graph,
    decode_rgb,
    is_plain_jpeg,
    open_image,
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


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_other_kinds_are_read(photo: Image.Image, kind: str) -> None:
    image = decode_rgb(encode(photo, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.shape == (97, 131, 3) and image.dtype == np.uint8
    if kind != "GIF":  # which has 256 colours
        np.testing.assert_array_equal(image, photo)


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
        (b"\xff\xd8\xff\xe0", "not an image"),
        (b"%PDF-1.4", "not an image"),
    ],
)
def test_what_is_no_image_says_so(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_rgb(data)


def test_truncated_image_says_so(photo: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"cannot be decoded.*truncated"):
        decode_rgb(encode(photo)[:900])


def test_too_many_pixels_are_refused_unread() -> None:
    bomb = encode(Image.new("1", (10_000, 10_000)), "PNG")
    assert len(bomb) < 50_000
    with pytest.raises(ImageError, match="10000x10000 pixels"):
        decode_rgb(bomb)


def test_preprocess_input_is_the_identity() -> None:
    """The notebooks' v2 to v4 call it; this project does not, because it does nothing."""
    image = np.random.default_rng(0).uniform(0, 255, (1, 9, 9, 3)).astype(np.float32)
    same = keras.applications.efficientnet.preprocess_input(image.copy())
    np.testing.assert_array_equal(same, image)
