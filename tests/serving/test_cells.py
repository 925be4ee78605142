"""What a client may send for an image, and what is said of the rest."""

import base64
import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from har.data.images import ImageError
from har.data.limits import SERVING_LIMITS
from har.serving.cells import read_cell


def image_bytes(kind: str) -> bytes:
    """Noise, so that both of the characters are used in which base64 differs from URL-safe."""
    pixels = np.random.default_rng(0).integers(0, 256, (29, 31, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


GOOD = image_bytes("JPEG")
TEXT = base64.b64encode(GOOD).decode()
URL_SAFE = base64.urlsafe_b64encode(GOOD).decode()
LINES = base64.encodebytes(GOOD).decode()

# The same image in all the ways that JSON clients send one.
JSON_CELLS: dict[str, Any] = {
    "standard": TEXT,
    "URL-safe": URL_SAFE,
    "URL-safe without padding": URL_SAFE.rstrip("="),
    "no padding": TEXT.rstrip("="),
    "padded too much": TEXT.rstrip("=") + "===",
    "lines of 76": LINES,
    "lines of Windows": LINES.replace("\n", "\r\n"),
    "spaces around": f"  \n{TEXT}\t ",
    "spaces for line breaks": LINES.replace("\n", " "),
    "data URI": f"data:image/jpeg;base64,{TEXT}",
    "data URI with a parameter": f"data:image/jpeg;name=a.jpg;base64,{TEXT}",
    "data URI in capitals": f"DATA:IMAGE/JPEG;BASE64,{TEXT}",
    "data URI without a kind": f"data:;base64,{TEXT}",
    "data URI, escaped": f"data:image/jpeg;base64,{TEXT.replace('+', '%2B').replace('=', '%3D')}",
    "data URI, URL-safe, lines": "data:image/jpeg;base64,\n" + URL_SAFE[:76] + "\n" + URL_SAFE[76:],
    "b64": {"b64": TEXT},
    "b64, URL-safe": {"b64": URL_SAFE},
    "b64 of a data URI": {"b64": f"data:image/png;base64,{TEXT}"},
}
# Only Python and Parquet have these.
PYTHON_CELLS: dict[str, Any] = {
    "bytes": GOOD,
    "bytearray": bytearray(GOOD),
    "memoryview": memoryview(GOOD),
    "numpy bytes": np.bytes_(GOOD),
    "numpy array": np.frombuffer(GOOD, np.uint8),
    "numpy text": np.str_(TEXT),
    "base64 in bytes": TEXT.encode(),
    "URL-safe in bytes": URL_SAFE.encode(),
}
# What is no image, and what its error says.
JSON_JUNK: dict[str, tuple[Any, str]] = {
    "null": (None, "null"),
    "integer": (3, "a number"),
    "fraction": (-2.5e300, "a number"),
    "NaN": (float("nan"), "null"),
    "true": (True, "a boolean"),
    "false": (False, "a boolean"),
    "list": ([1, 2], "a list of 2 values"),
    "list of the image": ([TEXT], "a list of 1 values"),
    "empty list": ([], "a list of 0 values"),
    "object": ({"picture": TEXT, "x": 1}, "an object of 2 values"),
    "b64 of a number": ({"b64": 3}, "an object of 1 values"),
    "b64 of b64": ({"b64": {"b64": TEXT}}, "an object of 1 values"),
    "URL": ("http://example.org/a.jpg", "a URL: 'http://example.org/a"),
    "address of a file": ("file:///etc/passwd", "a URL: 'file:///etc/passwd'"),
    "bucket": ("s3://bucket/key", "a URL"),
    "path": ("photos/a.jpg", "text that is not base64: 'photos/a.jpg'"),
    "text": ("not base64!", "text that is not base64: 'not base64!'"),
    "umlauts": ("größe", "text that is not base64"),
    "a control character": ("\0\x1b[31m", r"text that is not base64: '\\x00\\x1b"),
    "padding within": ("AAAA=AAA", "not base64"),
    "cut": (TEXT.rstrip("=")[:401], "cut off"),
    "one character": ("A", "cut off"),
    "data URI of text": ("data:text/plain,hello", "a data URI without base64"),
    "data URI, cut": ("data:image/png;base64", "a data URI without base64"),
    "empty": ("", "0 bytes"),
    "spaces": (" \n ", "0 bytes"),
    "data URI of nothing": ("data:image/png;base64,", "0 bytes"),
    "base64 of text": (base64.b64encode(b"just text").decode(), "not an image"),
}
PYTHON_JUNK: dict[str, tuple[Any, str]] = {
    "NaT": (pd.NaT, "null"),
    "NA": (pd.NA, "null"),
    "pixels": (np.zeros((4, 5, 3), np.uint8), r"an array of the shape \(4, 5, 3\), uint8"),
    "floats": (np.zeros(3), r"an array of the shape \(3,\), float64"),
    "a path": (io.BytesIO(b""), "a value of the type BytesIO"),
    "numpy number": (np.float32(1), "a number"),
    "numpy boolean": (np.bool_(True), "a boolean"),
    "a number of 10,000 digits": (10**10_000, "a number"),
}


@pytest.mark.parametrize("name", [*JSON_CELLS, *PYTHON_CELLS])
def test_a_cell_that_holds_a_file(name: str) -> None:
    assert "-" in URL_SAFE and "_" in URL_SAFE and TEXT.endswith("=")
    assert read_cell({**JSON_CELLS, **PYTHON_CELLS}[name]) == GOOD


@pytest.mark.parametrize("name", [*JSON_JUNK, *PYTHON_JUNK])
def test_a_cell_that_holds_none(name: str) -> None:
    cell, message = {**JSON_JUNK, **PYTHON_JUNK}[name]
    # bytes that are no image are found out by the decoder
    if message in ("0 bytes", "not an image"):
        assert read_cell(cell) in (b"", b"just text")
        return
    with pytest.raises(ImageError, match=message) as caught:
        read_cell(cell)
    assert len(str(caught.value)) < 120 and str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG"])
def test_a_file_is_never_taken_for_its_base64(kind: str) -> None:
    data = image_bytes(kind)
    for each in (data, b"", b"abc", b"\0AAA"):
        assert read_cell(each) == each
        assert read_cell(base64.b64encode(each).decode()) == each


def test_a_cell_beyond_the_limit_is_not_decoded() -> None:
    most = SERVING_LIMITS.bytes
    assert len(read_cell("A" * (most * 4 // 3 // 4 * 4))) <= most
    for text in ("A" * (most * 4 // 3 + 8), "data:;base64," + "A" * (2 * most)):
        with pytest.raises(ImageError, match="more than 25,000,000 bytes"):
            read_cell(text)
