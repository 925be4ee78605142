"""HTML pages without external files: thumbnails and figures in them, and labels in a figure."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from har.data.images import ImageError, decode_rgb, read_image

THUMBNAIL_PX = 112


def thumbnail(root: Path, path: str, size: int = THUMBNAIL_PX) -> Image.Image | None:
    """Shrink the image `path` of the folder `root` to `size` pixels, keeping its proportions; None
    if it cannot be read or lies outside of `root`.
    """
    try:
        return _shrink(read_image(root / path, inside=root), size)
    except ImageError:
        return None


def _shrink(data: bytes, size: int) -> Image.Image:
    picture = Image.fromarray(decode_rgb(data))
    picture.thumbnail((size, size))
    return picture


def thumbnail_uri(root: Path, path: str) -> str:
    """Return a thumbnail as a data URI; "" if the image is unreadable or outside of `root`."""
    try:
        return encode_thumbnail(read_image(root / path, inside=root))
    except ImageError:
        return ""


def encode_thumbnail(data: bytes) -> str:
    """Return the thumbnail of an image file's bytes as a data URI; "" if it is unreadable."""
    try:
        picture = _shrink(data, THUMBNAIL_PX)
    except ImageError:
        return ""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw_png(figure: Figure) -> bytes:
    """Draw a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _png_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def render_page(template: Path, **values: Any) -> str:
    """Render an HTML template; texts are escaped, and `png_uri` puts a PNG file into the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template.read_text(encoding="utf-8"))
    return page.render(png_uri=_png_uri, **values)


def one_line(text: str, width: int = 24) -> str:
    """Shorten a label to one line of at most `width` printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
