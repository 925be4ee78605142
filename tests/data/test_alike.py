"""The search finds the pairs that a comparison of all finds, and only those."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from scipy.sparse.csgraph import connected_components

from har.data import alike
from har.data.alike import find_closest, group_alike
from har.data.hashes import PLAIN, perceptual_hash
from tests.data.pictures import draw_picture

PHOTOGRAPHS = Path(__file__).with_name("photographs.txt")


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
    others = [perceptual_hash(draw_picture(seed)) for seed in range(40)]
    copy = perceptual_hash(ALTERATIONS[alteration](draw_picture(17)))
    assert find_closest([copy], others).tolist() == [17]


def test_different_pictures_are_not_alike() -> None:
    hashes = [perceptual_hash(draw_picture(seed)) for seed in range(300)]
    assert len(set(group_alike(hashes).tolist())) == 300


def format_words(words: np.ndarray) -> list[str]:
    """Hashes from (hashes, 4) integers."""
    return [each.astype(">u8").tobytes().hex() for each in words]


def flip_bits(words: np.ndarray, bits: int, rng: np.random.Generator) -> np.ndarray:
    """Flip up to `bits` random bits of each word."""
    flips = np.zeros_like(words)
    for _ in range(bits):
        flips ^= np.where(
            rng.random(words.shape) < 0.7,
            np.uint64(1) << rng.integers(0, 64, words.shape).astype(np.uint64),
            np.uint64(0),
        )
    return words ^ flips


def compare_all(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(first, second) number of differing bits, or 255 where they are not alike."""
    best = np.full((len(first), len(second)), 255)
    for column in (0, 2):
        dhash, phash = (
            np.bitwise_count(first[:, None, each] ^ second[:, column + each]).astype(int)
            for each in (0, 1)
        )
        near = (dhash <= alike.MAX_DHASH_DISTANCE) & (phash <= alike.MAX_PHASH_DISTANCE)
        best = np.where(near, np.minimum(best, dhash + phash), best)
    return best


def same_groups(first: np.ndarray, second: np.ndarray) -> bool:
    """True if two (images,) arrays of group numbers divide the images alike."""
    pairs = len(set(zip(first.tolist(), second.tolist(), strict=True)))
    return pairs == len(set(first.tolist())) == len(set(second.tolist()))


@st.composite
def near_and_far(draw: st.DrawFn) -> np.ndarray:
    """(hashes, 4) words: some random, and some with a few bits of those flipped, or mirrored."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    seeds = rng.integers(0, 2**64, (draw(st.integers(1, 12)), 4), dtype=np.uint64)
    copies = seeds[rng.integers(0, len(seeds), draw(st.integers(0, 150)))]
    altered = flip_bits(copies, draw(st.sampled_from([1, 3, 7, 9, 12])), rng)
    mirrored = np.where(rng.random((len(altered), 1)) < 0.3, altered[:, [2, 3, 0, 1]], altered)
    return np.concatenate([seeds, mirrored])


@settings(max_examples=60, deadline=None)
@given(near_and_far(), st.sampled_from([8, 64, 1 << 20]), st.sampled_from([0, 20]))
def test_the_groups_are_those_of_a_comparison_of_all(
    words: np.ndarray, most_pairs: int, pairs_per_sort: int
) -> None:
    expected = connected_components(compare_all(words, words) < 255, directed=False)[1]
    with pytest.MonkeyPatch.context() as patch:
        # many steps, and tables that are sorted again, as with large data
        patch.setattr(alike, "MAX_PAIRS", most_pairs)
        patch.setattr(alike, "PAIRS_PER_SORT", pairs_per_sort)
        found = group_alike(format_words(words))
    assert same_groups(found, expected)


@settings(max_examples=40, deadline=None)
@given(near_and_far(), st.sampled_from([8, 1 << 20]))
def test_the_closest_is_that_of_a_comparison_of_all(words: np.ndarray, most_pairs: int) -> None:
    first, second = words[::2], words[1::2]
    bits = compare_all(first, second)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "MAX_PAIRS", most_pairs)
        found = find_closest(format_words(first), format_words(second))
    for one, other in enumerate(found):
        best = bits[one].min(initial=255)
        assert (other == -1) == (best == 255)
        assert other == -1 or other == np.flatnonzero(bits[one] == best)[0]


@pytest.mark.parametrize("bits", [6, 7])
def test_the_limit_of_differing_bits_is_exact(bits: int) -> None:
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 2**64, (500, 4), dtype=np.uint64)
    flips = [sum(1 << int(at) for at in rng.choice(64, bits, replace=False)) for _ in words]
    altered = words.copy()
    altered[:, 0] ^= np.array(flips, np.uint64)
    found = find_closest(format_words(altered), format_words(words))
    assert found.tolist() == (list(range(500)) if bits == 6 else [-1] * 500)


def test_the_groups_of_6000_photographs_stay() -> None:
    """The hashes and groups that a comparison of all pairs gave on Kaggle's photographs.

    Each line is a hash and, for an image with copies, the numbers of its files' group (the same
    bytes) and of its group of near copies.
    """
    lines = [line.split(" ") for line in PHOTOGRAPHS.read_text().splitlines()]
    expected = np.array([int(each[2]) if len(each) > 1 else -n for n, each in enumerate(lines, 1)])
    found = group_alike([each[0] for each in lines])
    # byte-identical files have the same hash: no need to join them first
    assert len(lines) == 6000 and len(set(expected.tolist())) == 5955
    assert same_groups(found, expected)


def test_alike_hashes_take_little_memory_and_time() -> None:
    rng = np.random.default_rng(0)
    few_bits = (rng.random((20_000, 4, 16)) < 0.2) @ (
        np.uint64(1) << np.arange(0, 64, 4, np.uint64)
    )
    groups = group_alike(format_words(few_bits.astype(np.uint64)))
    assert np.bincount(groups).max() > 19_000


@pytest.mark.parametrize("text", [PLAIN, "0" * 63, "0" * 65, "g" * 64, "nan"])
def test_nothing_is_like_a_hash_that_says_nothing(text: str) -> None:
    assert same_groups(group_alike([text, "0" * 64, text]), np.arange(3))
    assert find_closest([text, "0" * 64], [text, "0" * 64]).tolist() == [-1, 1]


def test_no_images_no_pairs() -> None:
    assert group_alike([]).tolist() == [] == find_closest([], ["0" * 64]).tolist()
    assert find_closest(["0" * 64], []).tolist() == [-1]
    assert group_alike([PLAIN, PLAIN]).tolist() == [0, 1]
