"""Pictures inside a page: thumbnails, figures, and the text beside them."""

import base64
import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageOps

from har.data.images import ImageError, decode_rgb

THUMBNAIL_PX = 112


def thumbnail(path: Path) -> Image.Image | None:
    """The image within THUMBNAIL_PX, unstretched; None if it cannot be read."""
    try:
        pixels = decode_rgb(path.read_bytes())
    except (OSError, ImageError):
        return None
    return ImageOps.contain(Image.fromarray(pixels), (THUMBNAIL_PX, THUMBNAIL_PX))


def jpeg_uri(picture: Image.Image) -> str:
    """The picture inside the page."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def figure_uri(figure: Figure) -> str:
    """The figure inside the page."""
    return png_uri(draw_png(figure))


def draw_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def png_uri(png: bytes) -> str:
    """The file inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def one_line(text: str, width: int = 24) -> str:
    """A label fit to be drawn: one line of at most `width` characters that can be printed."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
