"""Copies of one picture: byte-identical files, and files that look alike.

Two perceptual hashes of 64 bits each must agree: a difference hash (is a pixel brighter than
its neighbour) and a DCT hash (the signs of low frequencies), both by ImageHash. Mirror images
count as copies, since training flips images. A picture with another watermark, size or
compression is found; a crop or another shot of the same scene mostly is not.
"""

from collections.abc import Callable, Iterator, Sequence

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Differing bits of 64. Chosen by eye on 6,000 Kaggle images: within these limits every pair is
# one picture or (once) two of a series; from phash 20 on, 5 of 7 pairs are unrelated, and from
# dhash 7 on nearly all are.
MAX_DHASH_DISTANCE = 6
MAX_PHASH_DISTANCE = 16
# The hashes, and the (width, height) in greys that each looks at.
HASHES = {imagehash.dhash: (9, 8), imagehash.phash: (32, 32)}
# Rows compared at once: bounds the memory to a few MB whatever the number of images.
BLOCK = 256
Ints = npt.NDArray[np.int64]


def perceptual_hash(image: Image.Image) -> str:
    """Four hashes as 64 hexadecimal digits: dhash and phash of an RGB image, then both of its
    mirror image.
    """
    grey = image.convert("L")
    # They find these small already: the large one is read twice, not four times.
    plain = [(hashed, grey.resize(HASHES[hashed], Image.Resampling.LANCZOS)) for hashed in HASHES]
    mirrored = [(hashed, ImageOps.mirror(picture)) for hashed, picture in plain]
    bits = [hashed(picture).hash for hashed, picture in plain + mirrored]
    # ImageHash's own digits, without going over the bits in Python one by one
    return np.packbits(bits).tobytes().hex()


def find_near(first: Sequence[str], second: Sequence[str]) -> tuple[Ints, Ints]:
    """Positions (pairs,) in `first` and in `second` of images that look alike."""
    ours, theirs = _parse_hashes(first), _parse_hashes(second)
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ours), BLOCK):
        block = ours[start : start + BLOCK]
        alike = _look_alike(block, theirs[:, :2]) | _look_alike(block, theirs[:, 2:])
        found.append(np.argwhere(alike) + np.array([start, 0]))
    pairs = np.concatenate(found)
    return pairs[:, 0], pairs[:, 1]


def _parse_hashes(hashes: Sequence[str]) -> npt.NDArray[np.uint64]:
    """(images, 4) from what `perceptual_hash` gives."""
    words = [int(text[at : at + 16], 16) for text in hashes for at in range(0, 64, 16)]
    return np.array(words, np.uint64).reshape(-1, 4)


def _look_alike(
    first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """(first, second) whether dhash, in column 0, and phash, in column 1, are both close."""
    near: npt.NDArray[np.bool_] = np.bitwise_count(first[:, None, 0] ^ second[:, 0]) <= (
        MAX_DHASH_DISTANCE
    )
    near &= np.bitwise_count(first[:, None, 1] ^ second[:, 1]) <= MAX_PHASH_DISTANCE
    return near


def group_near(table: pd.DataFrame) -> Ints:
    """Groups by bytes or looks; whatever is linked by a chain of copies is one group."""
    exact = group_exact(table)
    # one of each set of byte-identical files stands for it
    firsts = np.unique(exact, return_index=True)[1]
    hashes = table["perceptual_hash"].to_numpy()[firsts].tolist()
    one, other = find_near(hashes, hashes)
    links = coo_array((np.ones(len(one)), (one, other)), shape=(len(firsts), len(firsts)))
    joined = connected_components(links, directed=False)[1]
    return _renumber(joined[exact])


def group_exact(table: pd.DataFrame) -> Ints:
    """Groups by the files' bytes."""
    return _renumber(table["sha256"].to_numpy())


def _renumber(groups: npt.NDArray[np.generic]) -> Ints:
    """Integers from 0 in order of first appearance."""
    return pd.factorize(groups)[0].astype(np.int64)


# What counts as one group that no split parts: (images,) integers from a table with the
# columns sha256 and perceptual_hash.
DUPLICATES: dict[str, Callable[[pd.DataFrame], Ints]] = {
    "near": group_near,
    "exact": group_exact,
    "ignore": lambda table: np.arange(len(table)),
}


def describe_groups(table: pd.DataFrame) -> pd.DataFrame:
    """The images that have a copy, a row each, conflicting groups first: duplicate_group, kind
    (exact or near), conflicting (whether labels differ in the group), label, split, path.
    """
    by_group = table.groupby("duplicate_group")
    facts = table.assign(
        kind=np.where(by_group["sha256"].transform("nunique") > 1, "near", "exact"),
        conflicting=by_group["label"].transform("nunique") > 1,
    )
    copies = facts[by_group["path"].transform("size") > 1]
    columns = ["duplicate_group", "kind", "conflicting", "label", "split", "path"]
    ordered = copies.sort_values(
        ["conflicting", "duplicate_group"], ascending=[False, True], kind="stable"
    )
    return ordered[columns].reset_index(drop=True)


def find_copies(images: pd.DataFrame, among: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """(path in `images`, path in `among`, exact or near) for each pair of copies.

    Both have the columns path, sha256 and perceptual_hash.
    """
    hashes = [each["perceptual_hash"].tolist() for each in (images, among)]
    for one, other in zip(*find_near(*hashes), strict=True):
        left, right = images.iloc[one], among.iloc[other]
        kind = "exact" if left["sha256"] == right["sha256"] else "near"
        yield left["path"], right["path"], kind


def has_copy(images: pd.DataFrame, among: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """(images,) whether an image has a copy, exact or near, `among` others."""
    hashes = [each["perceptual_hash"].tolist() for each in (images, among)]
    found = np.zeros(len(images), dtype=bool)
    found[find_near(*hashes)[0]] = True
    return found
