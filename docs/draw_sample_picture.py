"""Draws docs/sample.png, the README's picture: one image of each action of the sample.

python docs/draw_sample_picture.py
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from har.data.sample import ACTIONS, draw_action

CELL, CAPTION, COLUMNS, SEED = (176, 132), 20, 5, 3


def draw_picture() -> Image.Image:
    """A grid of captioned drawings."""
    rows = -(-len(ACTIONS) // COLUMNS)
    width, height = CELL[0] + 8, CELL[1] + CAPTION + 8
    picture = Image.new("RGB", (COLUMNS * width + 8, rows * height + 8), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for i, action in enumerate(ACTIONS):
        left, top = 8 + i % COLUMNS * width, 8 + i // COLUMNS * height
        drawn = draw_action(action, np.random.default_rng([SEED, i]))
        picture.paste(ImageOps.fit(drawn, CELL), (left, top))
        draw.text((left + CELL[0] / 2, top + CELL[1] + 3), action, "black", font, anchor="ma")
    return picture


if __name__ == "__main__":
    small = draw_picture().quantize(256, dither=Image.Dither.NONE)
    small.save(Path(__file__).with_name("sample.png"), optimize=True)
