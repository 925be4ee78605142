"""Reads what clients send for an image, the same in every format of a request."""

import base64
import binascii
import math
import re
import string
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pandas as pd

from har.data.images import ImageError
from har.data.limits import SERVING_LIMITS

_ALPHABET = (string.ascii_letters + string.digits + "+/").encode()
# possessive: 25 MB without a match take no second
_BASE64_TEXT = re.compile(rb"[A-Za-z0-9+/_\-\s]++={0,2}+\s*+")
_URL = re.compile(rb"[A-Za-z][A-Za-z0-9+.\-]*://")
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\v\f"
# The characters of base64 that URLs escape, and line breaks.
_ESCAPES = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%0D": b"\r", b"%0A": b"\n"}
_MAX_ESCAPES = 100_000
# Characters of a client's text that an error repeats.
_MAX_SHOWN = 20


def read_cell(cell: Any) -> bytes:
    """Get an image's bytes from a client's value; raise an ImageError that says what it is.

    Bytes are the file. Text is its base64: standard or URL-safe, with or without line breaks and
    padding, alone, as a data URI, or as {"b64": text}.
    """
    if isinstance(cell, dict) and list(cell) == ["b64"] and isinstance(cell["b64"], str):
        cell = cell["b64"]
    if isinstance(cell, str):
        return _read_text(cell.encode("utf-8", errors="replace"))
    if isinstance(cell, np.ndarray) and cell.dtype == np.uint8 and cell.ndim == 1:
        return cell.tobytes()
    if not isinstance(cell, bytes | bytearray | memoryview):
        raise ImageError(f"neither bytes nor base64 but {_describe(cell)}")
    data = bytes(cell)
    # Some clients send base64 as bytes. No image that we accept consists of its characters only.
    if len(data) % 4 == 0 and _BASE64_TEXT.fullmatch(data):
        return _read_base64(data)
    return data


def _read_text(text: bytes) -> bytes:
    text = text.strip()
    if text[:5].lower() == b"data:":
        kind, comma, payload = text.partition(b",")
        if not comma or not kind.lower().rstrip().endswith(b";base64"):
            raise ImageError("a data URI without base64")
        return _read_base64(_unescape(payload))
    if _URL.match(text):
        raise ImageError(f"neither bytes nor base64 but a URL: {_show(text)}")
    return _read_base64(text)


def _unescape(text: bytes) -> bytes:
    # these in one go: unquote makes an object of each
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character).replace(escape.lower(), character)
    if text.count(b"%") > _MAX_ESCAPES:
        raise ImageError(f"a data URI with more than {_MAX_ESCAPES:,} escaped letters")
    return unquote_to_bytes(text) if b"%" in text else text


def _read_base64(text: bytes) -> bytes:
    most = SERVING_LIMITS.bytes
    plain = text.translate(_FROM_URL_SAFE, _WHITESPACE).rstrip(b"=")
    if len(plain) > most * 4 / 3 + 4:
        raise ImageError(f"{len(plain):,} characters of base64: more than {most:,} bytes")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        if not plain.translate(None, _ALPHABET):
            raise ImageError("base64 that is cut off: characters are missing") from error
        raise ImageError(f"text that is not base64: {_show(text)}") from error


def _show(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return ascii(shown[:_MAX_SHOWN] + ("..." if len(shown) > _MAX_SHOWN else ""))


def _describe(cell: Any) -> str:
    if isinstance(cell, bool | np.bool_):
        return "a boolean"
    if isinstance(cell, list | tuple):
        return f"a list of {len(cell):,} values"
    if isinstance(cell, dict):
        return f"an object of {len(cell):,} values"
    if isinstance(cell, np.ndarray):
        return f"an array of the shape {cell.shape}, {cell.dtype}"
    if cell is None or cell is pd.NaT or cell is pd.NA:
        return "null"
    if isinstance(cell, int | float | np.number):
        return "null" if isinstance(cell, float) and math.isnan(cell) else "a number"
    return f"a value of the type {type(cell).__name__}"
