"""Pictures that tests draw: rich ones, and kinds of plain ones that unrelated pictures share."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

Rng = np.random.Generator


def draw_picture(seed: int, size: tuple[int, int] = (260, 190)) -> Image.Image:
    """Discs and bars of random colours on a gradient: like no other seed's."""
    rng = np.random.default_rng(seed)
    shade = np.linspace(*rng.integers(0, 255, 2), size[0]).astype(np.uint8)
    image = Image.fromarray(np.tile(shade, (size[1], 1))).convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y, r = (int(v) for v in rng.integers(0, 200, 3))
        colour = tuple(int(v) for v in rng.integers(0, 255, 3))
        draw.ellipse((x, y, x + r // 2, y + r // 2), fill=colour)
        draw.rectangle((y, x, y + r // 4, x + r), fill=colour[::-1])
    return image


def draw_digit(rng: Rng) -> Image.Image:
    """A digit on black, as large as those of MNIST."""
    image = Image.new("L", (28, 28))
    place = tuple(int(v) for v in 9 + rng.integers(-3, 4, 2))
    ImageDraw.Draw(image).text(place, str(rng.integers(10)), fill=255)
    return image


def draw_product(rng: Rng) -> Image.Image:
    """One shape of one colour in the middle of white."""
    image = Image.new("RGB", (300, 300), "white")
    width, height = (int(v) for v in rng.integers(50, 130, 2))
    box = (150 - width, 150 - height, 150 + width, 150 + height)
    colour = tuple(int(v) for v in rng.integers(0, 220, 3))
    draw = ImageDraw.Draw(image)
    [draw.ellipse, draw.rectangle][rng.integers(2)](box, fill=colour)
    return image


def draw_screenshot(rng: Rng) -> Image.Image:
    """Lines of text on white."""
    image = Image.new("RGB", (480, 360), "white")
    draw = ImageDraw.Draw(image)
    for y in range(10, 350, 15):
        words = ("".join(rng.choice(list("aeinorst"), 6)) for _ in range(rng.integers(0, 11)))
        draw.text((10, y), " ".join(words), fill="black")
    return image


def draw_lines(rng: Rng) -> Image.Image:
    """A drawing with a pen."""
    image = Image.new("L", (256, 256), 255)
    points = [tuple(int(v) for v in each) for each in rng.integers(30, 226, (6, 2))]
    ImageDraw.Draw(image).line(points, fill=0, width=4)
    return image


def draw_icon(rng: Rng) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    x, y = (int(v) for v in rng.integers(8, 30, 2))
    colour = tuple(int(v) for v in rng.integers(0, 200, 3))
    ImageDraw.Draw(image).rounded_rectangle((x, y, x + 24, y + 20), radius=5, fill=colour)
    return image


def draw_noise_on_one_colour(rng: Rng) -> Image.Image:
    pixels = rng.integers(0, 255, 3) + rng.normal(0, 2, (100, 120, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_gradient(rng: Rng) -> Image.Image:
    """A shade from left to right."""
    shade = np.linspace(*rng.integers(0, 255, 2), 128).astype(np.uint8)
    return Image.fromarray(np.tile(shade, (96, 1)))


PLAIN_KINDS: dict[str, Callable[[Rng], Image.Image]] = {
    "digits on black": draw_digit,
    "products on white": draw_product,
    "screenshots": draw_screenshot,
    "line drawings": draw_lines,
    "icons": draw_icon,
    "noise on one colour": draw_noise_on_one_colour,
    "gradients": draw_gradient,
}


def draw_xray(rng: Rng) -> Image.Image:
    """Soft greys that are all built alike: a body, two lungs, a spine."""
    y, x = np.mgrid[0:128, 0:128] / 128
    width, height = rng.uniform(0.38, 0.46), rng.uniform(0.5, 0.6)
    grey = 0.75 * np.exp(-(((x - 0.5) / width) ** 4) - ((y - 0.55) / height) ** 4)
    for side in (0.3, 0.7):
        lung = ((x - side - rng.normal(0, 0.015)) / 0.11) ** 2
        grey -= 0.4 * np.exp(-lung - ((y - 0.5 - rng.normal(0, 0.02)) / 0.22) ** 2)
    grey += 0.3 * np.exp(-(((x - 0.5) / 0.04) ** 2)) + rng.normal(0, 0.01, x.shape)
    return Image.fromarray((np.clip(grey, 0, 1) * 220).astype(np.uint8))
