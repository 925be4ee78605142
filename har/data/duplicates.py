"""Copies of one image: byte-identical files, and images that look alike.

Images look alike if two perceptual hashes of 64 bits agree, both by ImageHash: a difference hash
(is a pixel brighter than its neighbour) and a DCT hash (the signs of low frequencies). Mirror
images count as copies, because training flips images. The hashes find an image with another
watermark, size or compression. They miss most crops and other shots of the same scene.
"""

from collections.abc import Callable, Iterator, Sequence

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Differing bits of 64. Chosen by eye on 6,000 Kaggle images: within these limits, every pair was
# one image or (once) two images of a series. From phash 20 on, 5 of 7 pairs were unrelated, and
# from dhash 7 on, nearly all.
MAX_DHASH_DISTANCE = 6
MAX_PHASH_DISTANCE = 16
# Each hash, and the (width, height) in grey levels that it works on.
HASHES = {imagehash.dhash: (9, 8), imagehash.phash: (32, 32)}
# Rows compared at once: limits the memory to a few MB for any number of images.
BLOCK = 256
Ints = npt.NDArray[np.int64]


def perceptual_hash(image: Image.Image) -> str:
    """Return 64 hexadecimal digits: dhash and phash of an RGB image, then of its mirror image."""
    grey = image.convert("L")
    # resized here, once for the image and its mirror image: ImageHash keeps images of this size
    small = [(each, grey.resize(size, Image.Resampling.LANCZOS)) for each, size in HASHES.items()]
    mirrored = [(hashed, ImageOps.mirror(picture)) for hashed, picture in small]
    bits = [hashed(picture).hash for hashed, picture in small + mirrored]
    # the digits that ImageHash prints, without its Python loop over the bits
    return np.packbits(bits).tobytes().hex()


def find_near(first: Sequence[str], second: Sequence[str]) -> tuple[Ints, Ints]:
    """Return the positions (pairs,) in `first` and in `second` of hashes that are alike."""
    ours, theirs = _parse_hashes(first), _parse_hashes(second)
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ours), BLOCK):
        block = ours[start : start + BLOCK]
        alike = _look_alike(block, theirs[:, :2]) | _look_alike(block, theirs[:, 2:])
        found.append(np.argwhere(alike) + np.array([start, 0]))
    pairs = np.concatenate(found)
    return pairs[:, 0], pairs[:, 1]


def _parse_hashes(hashes: Sequence[str]) -> npt.NDArray[np.uint64]:
    """(images, 4) integers from the digits of `perceptual_hash`."""
    words = [int(text[at : at + 16], 16) for text in hashes for at in range(0, 64, 16)]
    return np.array(words, np.uint64).reshape(-1, 4)


def _look_alike(
    first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """(first, second) True where both dhash (column 0) and phash (column 1) are close."""
    dhash_distance, phash_distance = (
        np.bitwise_count(first[:, None, column] ^ second[:, column]) for column in (0, 1)
    )
    near: npt.NDArray[np.bool_] = dhash_distance <= MAX_DHASH_DISTANCE
    return near & (phash_distance <= MAX_PHASH_DISTANCE)


def group_near(table: pd.DataFrame) -> Ints:
    """Group images with equal bytes or similar looks; a chain of copies is one group."""
    exact = group_exact(table)
    # compare one image of each set of byte-identical files
    firsts = np.unique(exact, return_index=True)[1]
    hashes = table["perceptual_hash"].to_numpy()[firsts].tolist()
    one, other = find_near(hashes, hashes)
    links = coo_array((np.ones(len(one)), (one, other)), shape=(len(firsts), len(firsts)))
    joined = connected_components(links, directed=False)[1]
    return _renumber(joined[exact])


def group_exact(table: pd.DataFrame) -> Ints:
    """Group images with equal bytes."""
    return _renumber(table["sha256"].to_numpy())


def _renumber(groups: npt.NDArray[np.generic]) -> Ints:
    """Integers from 0, in order of first appearance."""
    return pd.factorize(groups)[0].astype(np.int64)


# Functions from a table (columns sha256, perceptual_hash) to (images,) group numbers.
DUPLICATES: dict[str, Callable[[pd.DataFrame], Ints]] = {
    "near": group_near,
    "exact": group_exact,
    "ignore": lambda table: np.arange(len(table)),
}


def describe_groups(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each image that has a copy, groups with different labels first.

    The columns are duplicate_group, kind (exact or near), conflicting (True if the labels in the
    group differ), label, split, path.
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
    """Yield (path in `images`, path in `among`, "exact" or "near") for each pair of copies.

    Both tables have the columns path, sha256 and perceptual_hash.
    """
    for one, other in zip(*_find_pairs(images, among), strict=True):
        left, right = images.iloc[one], among.iloc[other]
        kind = "exact" if left["sha256"] == right["sha256"] else "near"
        yield left["path"], right["path"], kind


def has_copy(images: pd.DataFrame, among: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Return (images,) True for each image that has a copy, exact or near, in `among`."""
    return np.isin(np.arange(len(images)), _find_pairs(images, among)[0])


def _find_pairs(images: pd.DataFrame, among: pd.DataFrame) -> tuple[Ints, Ints]:
    return find_near(images["perceptual_hash"].tolist(), among["perceptual_hash"].tolist())
