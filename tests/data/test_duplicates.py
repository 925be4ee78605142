"""Copies are found whatever was done to them; other images are not."""

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageOps

from har.data.duplicates import DUPLICATES, describe_groups, find_near, group_near, perceptual_hash


def picture(seed: int, size: tuple[int, int] = (260, 190)) -> Image.Image:
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


def watermarked(image: Image.Image) -> Image.Image:
    marked = image.copy()
    ImageDraw.Draw(marked).text((90, 90), "STOCK PHOTO", fill="white")
    return marked


ALTERATIONS = {
    "smaller": lambda image: image.resize((150, 110), Image.Resampling.BICUBIC),
    "stretched": lambda image: image.resize((300, 200), Image.Resampling.BILINEAR),
    "mirrored": ImageOps.mirror,
    "watermarked": watermarked,
    "darker": lambda image: image.point(lambda v: v * 0.8),
    "mirrored and smaller": lambda image: ImageOps.mirror(image).resize((120, 90)),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_copy_is_found_among_others(alteration: str) -> None:
    others = [perceptual_hash(picture(seed)) for seed in range(40)]
    copy = perceptual_hash(ALTERATIONS[alteration](picture(17)))
    first, second = find_near([copy], others)
    assert (first.tolist(), second.tolist()) == ([0], [17])


def test_different_pictures_are_not_near() -> None:
    hashes = [perceptual_hash(picture(seed)) for seed in range(300)]
    first, second = find_near(hashes, hashes)
    assert (first == second).all() and len(first) == 300


def test_blocks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = [perceptual_hash(picture(seed % 7)) for seed in range(20)]
    whole = find_near(hashes, hashes)
    monkeypatch.setattr("har.data.duplicates.BLOCK", 3)
    parts = find_near(hashes, hashes)
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))


def test_no_images_no_pairs() -> None:
    assert [len(each) for each in find_near([], [perceptual_hash(picture(0))])] == [0, 0]
    assert [len(each) for each in find_near([perceptual_hash(picture(0))], [])] == [0, 0]


def chain() -> pd.DataFrame:
    """Byte-identical 0 and 2, 1 near 2's twin 3 by looks alone; 4 alone."""
    image = picture(1)
    looks = [image, ALTERATIONS["smaller"](image), image, ImageOps.mirror(image), picture(2)]
    return pd.DataFrame(
        {
            "sha256": ["a", "b", "a", "c", "d"],
            "perceptual_hash": [perceptual_hash(each) for each in looks],
            "label": ["x", "x", "x", "y", "z"],
            "split": "train",
            "path": list("01234"),
        }
    )


def test_groups_join_by_bytes_and_by_looks() -> None:
    table = chain()
    assert group_near(table).tolist() == [0, 0, 0, 0, 1]
    assert DUPLICATES["exact"](table).tolist() == [0, 1, 0, 2, 3]
    assert DUPLICATES["ignore"](table).tolist() == [0, 1, 2, 3, 4]


def test_groups_are_described_conflicting_ones_first() -> None:
    table = pd.concat([chain(), chain().iloc[[0, 2]]], ignore_index=True)
    table["duplicate_group"] = [1, 1, 1, 1, 2, 0, 0]
    found = describe_groups(table)
    assert found["conflicting"].tolist() == [True] * 4 + [False] * 2
    assert found["kind"].tolist() == ["near"] * 4 + ["exact"] * 2
    assert "4" not in found["path"].tolist()


def test_hashes_are_imagehashs_own() -> None:
    image = picture(3).convert("L")
    both = (image, ImageOps.mirror(image))
    expected = [f"{hashed(each)}" for each in both for hashed in (imagehash.dhash, imagehash.phash)]
    found = perceptual_hash(picture(3))
    # a resized mirror image and a mirrored resized one: equal but for rounding
    assert found[:32] == "".join(expected[:2])
    differing = (int(found, 16) ^ int("".join(expected), 16)).bit_count()
    assert len(found) == 64 and differing <= 2
