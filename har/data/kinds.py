"""Kinds of files, by their first bytes: the images that are read, and what else people have."""

import re

from PIL import features

# `find_kind` needs no more than this many bytes of a file.
HEAD_BYTES = 1024
READABLE = frozenset(
    ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])]
)

# A line break, spaces or a byte order mark before the first byte, from scripts and text tools.
_LEAD = re.compile(rb"(?:\s|\xef\xbb\xbf){0,64}")
# What begins these two kinds occurs nowhere else by chance: other junk before it is skipped too.
_LATE_START = re.compile(rb"\xff\xd8\xff[\xc0-\xfe]|\x89PNG\r\n\x1a\n")
# (kind, first bytes): the first that matches counts.
_SIGNATURES: tuple[tuple[str, bytes], ...] = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF.{4}WEBP"),
    ("GIF", rb"GIF8[79]a"),
    # two letters are too few: the size of the second header, and one colour plane, too
    ("BMP", rb"BM.{12}(?:\x0c\0\0\0.{4}|[\x28\x34\x38\x40\x6c\x7c]\0\0\0.{8})\x01\0"),
    ("Canon raw photo", rb"II\*\0.{4}CR\x02"),
    ("TIFF", rb"II\*\0|MM\0\*"),
    ("BigTIFF", rb"II\+\0|MM\0\+"),
    ("AVIF", rb".{4}ftyp(?:avi[fs]|(?:mif1|msf1|miaf).{4}(?:.{4}){0,8}avi[fs])"),
    ("HEIC", rb".{4}ftyp(?:he[iv][cxms]|mif[12]|msf1)"),
    ("JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"),
    ("JPEG XR", rb"II\xbc[\0\x01]"),
    ("PSD", rb"8BPS\0[\x01\x02]"),
    ("SVG", rb"(?i:(?:<\?xml|<!--|<!doctype svg).{0,800}<svg|<svg)\b"),
    ("ICO", rb"\0\0[\x01\x02]\0[\x01-\x40]\0.{3}[\0\x01]"),
    ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("PNM", rb"P[1-7]\s(?:#|\d|WIDTH)"),
    ("OpenEXR", rb"\x76\x2f\x31\x01"),
    ("DICOM", rb".{128}DICM"),
    ("PDF", rb"%PDF-"),
    ("camera raw photo", rb".{4}ftypcrx |FUJIFILMCCD-RAW|IIR[OS]|IIU\0"),
    ("MP4 video", rb".{4}ftyp"),
    ("QuickTime video", rb".{4}(?:moov|mdat|wide)"),
    ("AVI video", rb"RIFF.{4}AVI "),
    ("Matroska or WebM video", rb"\x1a\x45\xdf\xa3"),
    ("MPEG video", rb"\0\0\x01[\xb3\xba]"),
    ("Windows Media video", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    ("Flash video", rb"FLV\x01"),
    ("ZIP archive", rb"PK(?:\x03\x04|\x05\x06)"),
    ("gzip archive", rb"\x1f\x8b\x08"),
    ("bzip2 archive", rb"BZh[1-9]"),
    ("xz archive", rb"\xfd7zXZ\0"),
    ("Zstandard archive", rb"\x28\xb5\x2f\xfd"),
    ("7-Zip archive", rb"7z\xbc\xaf\x27\x1c"),
    ("RAR archive", rb"Rar!\x1a\x07"),
    ("tar archive", rb".{257}ustar"),
    ("Git LFS pointer", rb"version https://git-lfs"),
    ("git-annex pointer", rb"/annex/objects/|(?:\.\./)*\.git/annex/objects/"),
    ("HTML page", rb"(?i:<!doctype html|<html|<head\b|<body\b|(?:<!--|<\?xml).{0,800}<html\b)"),
    ("XML text", rb"<\?xml"),
    ("JSON text", rb"""\{\s*["}]|\[\s*\{"""),
    ("macOS metadata file", rb"\0\x05\x16[\x00\x07]"),
    ("NumPy array", rb"\x93NUMPY"),
    ("HDF5 file", rb"\x89HDF\r\n\x1a\n"),
    ("file of zero bytes", rb"\0{32}"),
)
_KINDS = tuple((kind, re.compile(first, re.DOTALL)) for kind, first in _SIGNATURES)

# Kinds whose name begins with a vowel when spoken.
_AN = ("AVI", "EPS", "HDF", "HTML", "ICO", "MP", "Open", "RAR", "SVG", "XML", "xz")
_CONVERT = "convert it to JPEG or PNG, for example `magick IN OUT.png`"
_FRAMES = "save frames of it as images, for example `ffmpeg -i IN frame_%05d.jpg`"
_UNPACK = "unpack it, and give the folder with the images"
_DOWNLOAD = "its download failed or needs a login; download the image again"
_NO_IMAGE = "remove it, or export images from it"
# (end of the kind's name, the way out): the first that matches counts.
_WAYS_OUT: tuple[tuple[str, str], ...] = (
    ("HEIC", "convert it to JPEG, for example `heif-convert IN.heic OUT.jpg`"),
    ("raw photo", "export it as JPEG from the camera's or a photo program"),
    ("PDF", "save its pages as images, for example `pdftoppm -png IN.pdf page`"),
    ("video", _FRAMES),
    ("archive", _UNPACK),
    ("Git LFS pointer", "run `git lfs pull` where the images come from"),
    ("git-annex pointer", "run `git annex get .` where the images come from"),
    ("HTML page", _DOWNLOAD),
    ("text", _DOWNLOAD),
    ("macOS metadata file", "delete it; it only describes another file"),
    ("NumPy array", _NO_IMAGE),
    ("HDF5 file", _NO_IMAGE),
    ("file of zero bytes", "it was not written completely; copy or download it again"),
)


def find_kind(head: bytes) -> tuple[str, int]:
    """Return the kind of a file by its first HEAD_BYTES bytes, and where in them it begins.

    The kind is in READABLE, or another known one such as `HEIC` or `HTML page`, or "" if it is
    unknown. Space and a byte order mark before a file's first byte are skipped; before a JPEG or
    PNG, any bytes.
    """
    head = head[:HEAD_BYTES]
    lead = _LEAD.match(head)
    for start in {0: None, lead.end() if lead else 0: None}:
        for kind, first in _KINDS:
            if first.match(head, start):
                return kind, start
    late = _LATE_START.search(head)
    return (find_kind(head[late.start() :])[0], late.start()) if late else ("", 0)


def name_kind(head: bytes) -> str:
    """Return the kind of a file by its first HEAD_BYTES bytes, as `find_kind`."""
    return find_kind(head)[0]


def explain_kind(kind: str) -> str:
    """Return what to do about a file of a kind that is not read; "" for an unknown kind."""
    if not kind or kind in READABLE:
        return ""
    return next((way for end, way in _WAYS_OUT if kind.endswith(end)), _CONVERT)


def describe_kind(kind: str) -> str:
    """Return a kind that is not read as a noun with its article, such as `an HTML page`."""
    picture = " " not in kind or kind.startswith("JPEG ")
    noun = f"{kind} picture" if picture and kind != "PDF" else kind
    return f"{'an' if noun.startswith(_AN) else 'a'} {noun}"
