"""One policy: metadata never decides about pixels, and pixels that are missing are an error."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from har.data.images import (
    ImageError,
    decode_rgb,
    is_blank,
    is_plain_jpeg,
    open_image,
    to_rgb,
)
from har.data.kinds import READABLE
from tests.data.making import (
    JPEG_END,
    PNG_START,
    TURNED,
    bad_chunk,
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
JPEG = encode(PHOTO, quality=90)
LARGE = encode(gradient(240, 320), quality=90)
PROGRESSIVE = encode(gradient(240, 320), quality=90, progressive=True)
CMYK = encode(gradient(240, 320).convert("CMYK"), quality=90)
PNG = png(PHOTO)
WEBP = riff(webp_pixels(PHOTO))
GIF = encode(PHOTO.quantize(64), "GIF")
BMP = encode(PHOTO, "BMP")
TIFF = tiff(PHOTO)
LZW = encode(PHOTO, "TIFF", compression="tiff_lzw")
AVIF = encode(PHOTO, "AVIF", quality=90) if "AVIF" in READABLE else b""
EXIF = b"Exif\0\0"
ADOBE = b"http://ns.adobe.com/xap/1.0/\0"
XMP_TURNED = b'<rdf:Description tiff:Orientation="6" tiff:Make="x">'


def app1(data: bytes) -> bytes:
    return with_segments(JPEG, segment(0xE1, data))


def middle(data: bytes, patch: bytes) -> bytes:
    """The file with some bytes in its middle replaced."""
    at = len(data) // 2
    return data[:at] + patch + data[at + len(patch) :]


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def after_first_scans(progressive: bytes, scans: int) -> bytes:
    """A progressive JPEG that ends where a scan ends."""
    at = -1
    for _ in range(scans + 1):
        at = progressive.index(b"\xff\xda", at + 1)
    return progressive[: progressive.rindex(b"\xff\xc4", 0, at)]


def png_text(body: bytes) -> bytes:
    return png(PHOTO, chunk(b"tEXt", body))


PROFILE = b"Raw profile type exif\0"
HEX = b"\nexif\n      40\n" + (EXIF + exif(TURNED)).hex().encode() + b"\n"

# name: (file, the same picture without the oddity)
READ = {
    # Exif
    "resolution -1/0": (
        app1(EXIF + exif((0x11A, 10, 1, b"\x1a\0\0\0"), more=struct.pack("<ll", -1, 0))),
        JPEG,
    ),
    "undefined resolution": (
        app1(EXIF + exif((0x11A, 7, 9, b"\0\0\0\0"), (0x128, 3, 1, b"\3\0\0\0"))),
        JPEG,
    ),
    "offset beyond the end": (app1(EXIF + exif((0x11A, 5, 1, b"\xff\xff\xff\xff"))), JPEG),
    "nothing but its name": (app1(EXIF), JPEG),
    "cut in its table": (app1(EXIF + exif(TURNED)[:14]), JPEG),
    "table outside": (app1(EXIF + b"II*\0\xff\xff\xff\x7f"), JPEG),
    "table counts 65535 tags": (app1(EXIF + b"II*\0\x08\0\0\0\xff\xff" + bytes(600)), JPEG),
    "no byte order": (app1(EXIF + b"??*\0\x08\0\0\0\1\0"), JPEG),
    "orientation 0": (app1(EXIF + exif((0x112, 3, 1, b"\0\0\0\0"))), JPEG),
    "orientation 99": (app1(EXIF + exif((0x112, 3, 1, b"\x63\0\0\0"))), JPEG),
    "several Exif segments": (with_segments(JPEG, *[segment(0xE1, EXIF + exif())] * 50), JPEG),
    # other segments
    "profile in wrong pieces": (
        with_segments(JPEG, *[segment(0xE2, b"ICC_PROFILE\0\1\xaf" + bytes(9))] * 175),
        JPEG,
    ),
    "several pictures (MPF)": (with_segments(JPEG, segment(0xE2, b"MPF\0garbage")) + JPEG, JPEG),
    "Photoshop garbage": (with_segments(JPEG, segment(0xED, b"Photoshop 3.0\08BIM\4")), JPEG),
    "comment in latin-1": (with_segments(JPEG, segment(0xFE, b"caf\xe9 \x1b[31m")), JPEG),
    "JFIF of version 9": (JPEG.replace(b"JFIF\0\1", b"JFIF\0\x09"), JPEG),
    "JFIF cut": (with_segments(JPEG, segment(0xE0, b"JFIF\0")), JPEG),
    # before, between and after
    "line break before": (b"\n" + JPEG, JPEG),
    "byte order mark before": (b"\xef\xbb\xbf" + JPEG, JPEG),
    "headers of HTTP before": (b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + JPEG, JPEG),
    "warning of PHP before": (b"<br />\n<b>Warning</b>: mkdir()\n" + JPEG, JPEG),
    "junk between segments": (JPEG[:20] + b"junk" + JPEG[20:], JPEG),
    "fill bytes": (JPEG[:2] + b"\xff" * 99 + JPEG[2:], JPEG),
    "junk after": (JPEG + b"junk" * 99, JPEG),
    "a video after": (JPEG + b"\0\0\0\x18ftypmp42" + bytes(999), JPEG),
    "no end marker": (JPEG[:-2], JPEG),
    "half an end marker": (JPEG[:-1], JPEG),
    "filled up before the end marker": (JPEG[:-2] + bytes(40) + JPEG_END, JPEG),
    "filled up with FF": (JPEG[:-2] + b"\xff" * 40 + JPEG_END, JPEG),
    "scan with the numbers of another kind": (
        JPEG.replace(b"\x11\0\x3f\0", b"\x11\0\0\0", 1),
        JPEG,
    ),
    "progressive without an end marker": (PROGRESSIVE[:-2], PROGRESSIVE),
    "CMYK without an end marker": (CMYK[:-2], CMYK),
    # PNG
    "profile of 2 MB": (
        png(PHOTO, chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000)))),
        PNG,
    ),
    "text with a wrong checksum": (png(PHOTO, bad_chunk(b"tEXt", b"k\0value")), PNG),
    "profile with a wrong checksum": (png(PHOTO, bad_chunk(b"iCCP", b"p\0\0garbage")), PNG),
    "time after the pixels, wrong checksum": (png(PHOTO, after=bad_chunk(b"tIME", bytes(7))), PNG),
    "text that inflates to 20 MB": (
        png(PHOTO, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(20_000_000)))),
        PNG,
    ),
    "text that is not compressed": (png(PHOTO, chunk(b"zTXt", PROFILE + b"\0garbage")), PNG),
    "profile that is not hexadecimal": (png_text(PROFILE + b"\nexif\n4\nxyz\n"), PNG),
    "gamma, size and colours of nonsense": (
        png(PHOTO, chunk(b"gAMA", bytes(4)) + chunk(b"pHYs", b"\xff" * 9) + chunk(b"cHRM", b"")),
        PNG,
    ),
    "no IEND": (png(PHOTO, end=b""), PNG),
    "cut in IEND": (PNG[:-6], PNG),
    "cut in a text after the pixels": (
        png(PHOTO, after=chunk(b"tEXt", bytes(99))[:50], end=b""),
        PNG,
    ),
    "junk after a PNG": (PNG + b"junk", PNG),
    "line break before a PNG": (b"\r\n" + PNG, PNG),
    "pixels in empty chunks too": (png(PHOTO, chunk(b"IDAT", b"") * 99), PNG),
    # WebP
    "WebP with garbage for Exif": (
        riff(
            webp_header(PHOTO, 0x2C), (b"ICCP", b"\xff" * 99), webp_pixels(PHOTO), (b"EXIF", b"?")
        ),
        WEBP,
    ),
    "WebP cut in its XMP": (
        riff(webp_header(PHOTO, 0x04), webp_pixels(PHOTO), (b"XMP ", bytes(99)))[:-50],
        WEBP,
    ),
    "WebP of a wrong size": (WEBP[:4] + b"\xff\xff\0\0" + WEBP[8:], WEBP),
    "WebP with junk after": (WEBP + b"junk", WEBP),
    # GIF
    "GIF without its end": (GIF[:-1], GIF),
    "GIF with empty blocks": (GIF.replace(b",\0\0\0\0", b"\0\0,\0\0\0\0", 1), GIF),
    "GIF with comments": (GIF[:-1] + b"!\xfe\4text\0" * 9 + b";", GIF),
    "GIF with half a second frame": (GIF[:-1] + b",\0\0\0\0\x40\0\x30\0\0\7\x20ab", GIF),
    # BMP and TIFF
    "BMP with junk after": (BMP + b"junk", BMP),
    "BMP that tells a wrong size": (BMP[:2] + b"\xff\xff\xff\xff" + BMP[6:], BMP),
    "TIFF with wild tags": (tiff(PHOTO, (34675, 7, 2**31, 8), (700, 1, 2**32 - 1, 9)), TIFF),
    "TIFF with a resolution outside": (tiff(PHOTO, (282, 5, 1, 2**31), (283, 5, 1, 2**31)), TIFF),
    "TIFF with a table of photo data outside": (tiff(PHOTO, (34665, 4, 1, 2**31)), TIFF),
    "TIFF with a second page outside": (TIFF[:-4] + b"\xff\xff\xff\x7f", TIFF),
    "TIFF of one row a strip": (tiff(PHOTO, strips=48), TIFF),
}
if AVIF:
    READ |= {
        "AVIF with junk after": (AVIF + b"junk", AVIF),
        "AVIF with odd Exif": (
            encode(PHOTO, "AVIF", quality=90, exif=exif((0x9999, 7, 4, b"\xff" * 4)), xmp=b"?"),
            AVIF,
        ),
        "AVIF with a profile": (encode(PHOTO, "AVIF", quality=90, icc_profile=b"\xff" * 999), AVIF),
    }


@pytest.mark.parametrize("name", READ)
def test_metadata_never_decides_about_pixels(name: str) -> None:
    data, plain = READ[name]
    np.testing.assert_array_equal(decode_rgb(data), decode_rgb(plain))


# name: (file, the same picture that is not turned)
TURNED_FILES = {
    "short": (app1(EXIF + exif(TURNED)), JPEG),
    "long": (app1(EXIF + exif((0x112, 4, 1, struct.pack("<L", 6)))), JPEG),
    "big-endian": (app1(EXIF + exif((0x112, 3, 1, struct.pack(">HH", 6, 0)), order=">")), JPEG),
    "among nonsense": (
        app1(
            EXIF + exif((0x11A, 10, 1, b"\xff" * 4), TURNED, (0x9999, 99, 2**32 - 1, b"\xff" * 4))
        ),
        JPEG,
    ),
    "table cut after it": (app1(EXIF + exif(TURNED, TURNED, TURNED)[:30]), JPEG),
    "XMP": (app1(ADOBE + XMP_TURNED), JPEG),
    "XMP element": (app1(ADOBE + b"<tiff:Orientation>6</tiff:Orientation>"), JPEG),
    "PNG": (png(PHOTO, chunk(b"eXIf", exif(TURNED))), PNG),
    "PNG, prefix": (png(PHOTO, chunk(b"eXIf", EXIF + exif(TURNED))), PNG),
    "PNG, wrong checksum": (png(PHOTO, bad_chunk(b"eXIf", exif(TURNED))), PNG),
    "PNG, after its pixels": (png(PHOTO, after=chunk(b"eXIf", exif(TURNED))), PNG),
    "PNG by ImageMagick": (png_text(PROFILE + HEX), PNG),
    "PNG by ImageMagick, compressed": (
        png(PHOTO, chunk(b"zTXt", PROFILE + b"\0" + zlib.compress(HEX))),
        PNG,
    ),
    "PNG, XMP": (
        png(PHOTO, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_TURNED)),
        PNG,
    ),
    "WebP": (riff(webp_header(PHOTO, 8), webp_pixels(PHOTO), (b"EXIF", exif(TURNED))), WEBP),
    "WebP, XMP": (riff(webp_header(PHOTO, 4), webp_pixels(PHOTO), (b"XMP ", XMP_TURNED)), WEBP),
    "TIFF": (tiff(PHOTO, (0x112, 3, 1, 6)), TIFF),
}


@pytest.mark.parametrize("name", TURNED_FILES)
def test_orientation_is_read_tolerantly(name: str) -> None:
    data, plain = TURNED_FILES[name]
    assert open_image(data).orientation == 6
    np.testing.assert_array_equal(decode_rgb(data), np.rot90(decode_rgb(plain), -1))


def test_orientation_of_exif_goes_before_that_of_xmp() -> None:
    upright = segment(0xE1, EXIF + exif((0x112, 3, 1, b"\1\0\0\0")))
    data = with_segments(JPEG, segment(0xE1, ADOBE + XMP_TURNED), upright)
    assert open_image(data).orientation == 1


def frame_of(kind: int, bits: int = 8, components: int = 3) -> bytes:
    """A JPEG whose frame header says something else."""
    at = JPEG.index(b"\xff\xc0")
    body = bytes([bits]) + JPEG[at + 5 : at + 9] + bytes([components]) + b"\1\x11\0" * components
    return JPEG[:at] + segment(kind, body) + JPEG[at + 19 :]


CUT = "truncated"
DAMAGED = {
    "half a JPEG": (half(LARGE), CUT),
    "half a JPEG and an end marker": (half(LARGE) + JPEG_END, CUT),
    "a JPEG but for its last 1 %": (LARGE[: len(LARGE) * 99 // 100] + JPEG_END, CUT),
    "half a JPEG, then another": (half(LARGE) + JPEG, CUT),
    "half a header, then another JPEG": (JPEG[:300] + JPEG, "truncated|corrupt"),
    "half a JPEG of CMYK": (half(CMYK) + JPEG_END, CUT),
    "half a grey JPEG": (half(encode(gradient(240, 320).convert("L"))) + JPEG_END, CUT),
    "half a progressive JPEG": (half(PROGRESSIVE) + JPEG_END, CUT),
    "three scans of ten": (after_first_scans(PROGRESSIVE, 3), "lacks some of its scans"),
    "nine scans of ten": (after_first_scans(PROGRESSIVE, 9) + JPEG_END, "lacks some of its scans"),
    "a JPEG's header": (JPEG[:300], CUT),
    "a JPEG's first bytes": (JPEG[:4], CUT),
    "only start and end": (b"\xff\xd8\xff\xd9", CUT),
    "zeros in a JPEG": (middle(LARGE, bytes(999)), "corrupt|truncated"),
    "text in a JPEG": (middle(LARGE, b"<html>" * 99), "corrupt|truncated"),
    "a JPEG within a JPEG": (middle(LARGE, JPEG), "corrupt|truncated"),
    "bytes lost in a JPEG": (half(LARGE) + LARGE[len(LARGE) // 2 + 999 :], "corrupt|truncated"),
    "a JPEG of no height": (JPEG.replace(b"\0\x30\0\x40", b"\0\0\0\x40"), "no pixels"),
    "12 bits": (frame_of(0xC1, bits=12), "12 bits"),
    "two colours": (frame_of(0xC0, components=2), "2 colour components"),
    "hierarchical": (frame_of(0xC5), "hierarchical"),
    "two frames": (with_segments(JPEG, segment(0xC0, JPEG[162:177])), "corrupt|cannot be decoded"),
    "half a PNG": (half(PNG), CUT),
    "half a PNG and its end": (half(PNG) + chunk(b"IEND", b""), "truncated|wrong checksum"),
    "a PNG without pixels": (PNG_START + PNG[8:33] + chunk(b"IEND", b""), CUT),
    "a PNG's first bytes": (PNG[:12], CUT),
    "a PNG of too few rows": (
        png(gradient(20, 64)).replace(b"\0\0\0\x14", b"\0\0\0\x15", 1),
        "checksum",
    ),
    "zeros in a PNG": (middle(PNG, bytes(20)), "wrong checksum"),
    "a palette with a wrong checksum": (
        encode(PHOTO.quantize(8), "PNG").replace(b"PLTE", b"PLTE\1", 1),
        "wrong checksum|truncated",
    ),
    "Apple's PNG": (PNG_START + chunk(b"CgBI", bytes(4)) + PNG[8:], "Apple"),
    "half a WebP": (half(WEBP), CUT),
    "half a lossy WebP": (half(encode(PHOTO, "WEBP", quality=90)), CUT),
    "half a WebP that tells so": (
        riff((WEBP[12:16], half(webp_pixels(PHOTO)[1]))),
        "cannot be decoded",
    ),
    "half a GIF": (half(GIF), CUT),
    "half a GIF and its end": (half(GIF) + b"\0;", CUT),
    "a GIF's header": (GIF[:20], CUT),
    "half a BMP": (half(BMP), CUT),
    "a BMP's header": (BMP[:30], CUT),
    "a compressed BMP": (BMP[:30] + b"\1" + BMP[31:], "compressed BMP"),
    "half a TIFF": (TIFF[:8] + TIFF[len(TIFF) // 2 :], "truncated|corrupt"),
    "a TIFF's header": (TIFF[:20], "corrupt|truncated"),
    "half an LZW TIFF": (half(LZW), "truncated|corrupt"),
    "pixels beyond a TIFF's end": (tiff(PHOTO, (273, 4, 1, 2**31)), "cannot be decoded"),
    "JPEG in a TIFF": (encode(PHOTO, "TIFF", compression="jpeg"), r"rare compression \(7\)"),
    "fax in a TIFF": (
        encode(PHOTO.convert("1"), "TIFF", compression="group4"),
        r"rare compression \(4\)",
    ),
    "a raw photo's preview": (tiff(PHOTO, (254, 4, 1, 1)), "raw photo"),
    "a DNG": (tiff(PHOTO, (50706, 1, 4, 0x104)), "raw photo"),
    "floating point": (encode(Image.new("F", (8, 8)), "TIFF"), "8 bits"),
}
if AVIF:
    DAMAGED |= {
        "half an AVIF": (half(AVIF), "truncated|cannot be decoded"),
        "an AVIF's header": (AVIF[:60], CUT),
        "zeros in an AVIF": (AVIF[:-200] + bytes(200), "decoded"),
    }


@pytest.mark.parametrize("name", DAMAGED)
def test_missing_pixels_are_an_error(name: str) -> None:
    data, message = DAMAGED[name]
    with pytest.raises(ImageError, match=message) as caught:
        decode_rgb(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READ | TURNED_FILES)
def test_plain_jpegs_are_the_same_in_tensorflow(name: str) -> None:
    data = (READ | TURNED_FILES)[name][0]
    if is_plain_jpeg(open_image(data)):
        found = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        np.testing.assert_array_equal(found, decode_rgb(data))


# a reader that is less tolerant may fail, or read other pixels
ODD_JPEGS = {
    "line break before": READ["line break before"][0],
    "no end marker": READ["no end marker"][0],
    "half an end marker": READ["half an end marker"][0],
    "junk between segments": READ["junk between segments"][0],
    "scan with other numbers": READ["scan with the numbers of another kind"][0],
    "turned": TURNED_FILES["short"][0],
    "turned by XMP": TURNED_FILES["XMP"][0],
    "CMYK": CMYK,
    "colours by Adobe's code 0": with_segments(JPEG, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")),
    "colours by Adobe's code 2": with_segments(JPEG, segment(0xEE, b"Adobe\0\x64\0\0\0\0\2")),
    "arithmetic coding": JPEG.replace(b"\xff\xc0", b"\xff\xc9", 1),
    "lossless": frame_of(0xC3, components=1),
    "rare sampling": JPEG.replace(b"\1\x22\0", b"\1\x42\0", 1),
    "large": encode(Image.new("L", (5_100, 5_000))),
}


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_odd_jpegs_are_not_for_tensorflow(name: str) -> None:
    assert not is_plain_jpeg(open_image(ODD_JPEGS[name]))


PLAIN_JPEGS = {
    "baseline": JPEG,
    "progressive": PROGRESSIVE,
    "grey": encode(PHOTO.convert("L")),
    "4:4:4": encode(PHOTO, subsampling="4:4:4"),
    "4:2:2": encode(PHOTO, subsampling="4:2:2"),
    "with Exif": app1(EXIF + exif((0x112, 3, 1, b"\1\0\0\0"))),
    "with junk after": READ["junk after"][0],
}


@pytest.mark.parametrize("name", PLAIN_JPEGS)
def test_common_jpegs_are_for_tensorflow(name: str) -> None:
    assert is_plain_jpeg(open_image(PLAIN_JPEGS[name]))


def test_one_colour_and_all_transparent_are_blank() -> None:
    clear = Image.new("RGBA", (64, 48), (1, 2, 3, 0))
    for data in (encode(clear, "PNG"), encode(Image.new("L", (9, 9), 77)), encode(clear, "WEBP")):
        assert is_blank(to_rgb(open_image(data)))
    assert not is_blank(PHOTO)
    dot = Image.new("RGB", (9, 9))
    dot.putpixel((8, 8), (0, 0, 1))
    assert not is_blank(dot)


def test_pillow_reads_no_metadata(caplog: pytest.LogCaptureFixture) -> None:
    """Pillow warns of each tag that it skips, in megabytes."""
    for name in ("TIFF with wild tags", "resolution -1/0", "gamma, size and colours of nonsense"):
        image = Image.open(io.BytesIO(open_image(READ[name][0]).data))
        image.load()
        assert not {"exif", "icc_profile", "xmp", "comment"} & set(image.info)
    assert not caplog.records
