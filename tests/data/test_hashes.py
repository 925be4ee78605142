"""Hashes stay nearly the same under harmless changes; plain pictures have none."""

import imagehash
import numpy as np
import pytest
from PIL import ImageOps

from har.data.hashes import PLAIN, perceptual_hash
from tests.data.pictures import PLAIN_KINDS, draw_picture


def test_hashes_are_imagehashs_own() -> None:
    image = draw_picture(3).convert("L")
    both = (image, ImageOps.mirror(image))
    expected = [f"{hashed(each)}" for each in both for hashed in (imagehash.dhash, imagehash.phash)]
    found = perceptual_hash(draw_picture(3))
    # a resized mirror image and a mirrored resized one: equal but for rounding
    assert found[:32] == "".join(expected[:2])
    differing = (int(found, 16) ^ int("".join(expected), 16)).bit_count()
    assert len(found) == 64 and differing <= 2


@pytest.mark.parametrize("kind", PLAIN_KINDS)
def test_plain_pictures_have_no_hash(kind: str) -> None:
    rng = np.random.default_rng(0)
    pictures = [PLAIN_KINDS[kind](rng) for _ in range(60)]
    plain = [perceptual_hash(each.convert("RGB")) == PLAIN for each in pictures]
    assert np.mean(plain) > 0.8


def test_pictures_with_much_to_see_have_one() -> None:
    found = [perceptual_hash(draw_picture(seed)) for seed in range(40)]
    # some of them are two wide bars on one colour
    assert found.count(PLAIN) <= 4
