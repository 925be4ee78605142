"""Kinds of files by their first bytes, and what is said of those that are not read."""

import pytest

from har.data.images import ImageError, decode_rgb
from har.data.kinds import HEAD_BYTES, READABLE, describe_kind, explain_kind, name_kind
from tests.data.making import encode, gradient

OTHERS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
    "HEIC, by its second name": b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(40),
    "JPEG XL": b"\xff\x0a" + bytes(40),
    "JPEG XL, in boxes": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40),
    "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40),
    "PSD": b"8BPS\0\1" + bytes(40),
    "SVG": b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="3">',
    "SVG, alone": b'<svg xmlns="http://www.w3.org/2000/svg">',
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(40),
    "PDF": b"%PDF-1.4\n",
    "BigTIFF": b"II+\0\x08\0\0\0" + bytes(40),
    "Canon raw photo": b"II*\0\x10\0\0\0CR\x02\0" + bytes(40),
    "MP4 video": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(40),
    "AVI video": b"RIFF\0\0\1\0AVI LIST" + bytes(40),
    "Matroska or WebM video": b"\x1a\x45\xdf\xa3" + bytes(40),
    "ZIP archive": b"PK\3\4\x14\0" + bytes(40),
    "gzip archive": b"\x1f\x8b\x08\0" + bytes(40),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "git-annex pointer": b"/annex/objects/SHA256E-s3--00.jpg\n",
    "HTML page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
    "HTML page, after blanks": b"\r\n\r\n  <HTML lang=en>",
    "XML text": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "JSON text": b'{"message": "Not found"}',
    "macOS metadata file": b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(40),
    "file of zero bytes": bytes(5000),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds_are_named_with_the_way_out(name: str) -> None:
    kind = name.partition(",")[0]
    assert name_kind(OTHERS[name]) == kind
    with pytest.raises(ImageError) as caught:
        decode_rgb(OTHERS[name])
    message = str(caught.value)
    assert message == f"{describe_kind(kind)}, not an image that is read: {explain_kind(kind)}"
    assert len(explain_kind(kind)) > 10 and "\n" not in message


LEADS = {
    "none": b"",
    "line break": b"\r\n",
    "byte order mark": b"\xef\xbb\xbf",
    "blanks": b" " * 60,
}


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("kind", sorted(READABLE))
def test_images_are_known_by_content(kind: str, lead: str) -> None:
    data = LEADS[lead] + encode(gradient(), kind)
    assert name_kind(data) == name_kind(data[:HEAD_BYTES]) == kind
    assert explain_kind(kind) == ""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a,b\n1,2\n",
        b"BMW is a car, and this is a text about it",
        b"\xff" * 2000,
        b"GIF",
        b"\0",
    ],
)
def test_the_rest_has_no_name(data: bytes) -> None:
    assert name_kind(data) == explain_kind("") == ""


def test_messages_are_english() -> None:
    assert describe_kind("HEIC") == "a HEIC picture"
    assert describe_kind("HTML page") == "an HTML page"
    assert describe_kind("MP4 video") == "an MP4 video"
    assert describe_kind("PDF") == "a PDF"
    assert "git lfs pull" in explain_kind("Git LFS pointer")
    assert "heif-convert" in explain_kind("HEIC")
