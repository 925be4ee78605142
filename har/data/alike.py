"""Find hashes that are alike, among hundreds of thousands and with little memory.

Two hashes of `har.data.hashes` are alike if their dhashes and their phashes are close. Mirror
images are alike too, because training flips images. Nothing is like a plain picture.

The search is multi-index hashing. Two dhashes with at most 6 differing bits have a quarter, of 16
bits, with at most 1: with 2 in each of the 4 quarters they would differ in 8. So four tables of
quarters, each looked up at the quarter itself and at its 16 neighbours with one flipped bit, find
every pair. A hash of a photograph is compared with about one of 300 others.

faiss has such an index. With 200,000 hashes it takes 7 times as long, and more with hashes that
are all alike: it cannot leave out pairs that are in one group already.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Differing bits of 64. Chosen by eye on 6,000 Kaggle images: within these limits, every pair was
# one image or (once) two images of a series. From phash 20 on, 5 of 7 pairs were unrelated, and
# from dhash 7 on, nearly all.
MAX_DHASH_DISTANCE = 6
MAX_PHASH_DISTANCE = 16
# Every hash but PLAIN. A prepared folder from elsewhere may hold anything.
DIGITS = re.compile("[0-9a-f]{64}")

PROBES = np.concatenate([[0], 1 << np.arange(16)])
# Neighbouring bits of a dhash often agree. Quarters of bits from everywhere vary more.
BIT_ORDER = np.random.default_rng(0).permutation(64)
# Pairs that are compared at once: they limit the memory to about 100 MB, whatever the hashes.
MAX_PAIRS = 1 << 20
# Hashes that are looked up at once.
MAX_LOOK_UPS = 8192
# So few hashes are compared rather than left out.
FEW = 8
# Sorting the tables takes as long as comparing so many pairs a hash.
PAIRS_PER_SORT = 20
NO_GROUP = -1
NOTHING = np.iinfo(np.int64).max

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def group_alike(hashes: Sequence[str]) -> Ints:
    """Return (hashes,) group numbers: hashes that are alike, or joined by a chain, share one.

    A plain picture is alone in its group.
    """
    told, words = _parse_hashes(hashes)
    distinct, codes = np.unique(words, axis=0, return_inverse=True)
    groups = np.arange(len(hashes)) + len(distinct)
    groups[told] = _join_alike(distinct)[codes]
    return groups


def find_closest(first: Sequence[str], second: Sequence[str]) -> Ints:
    """Return (first,) positions in `second` of the closest hash that is alike, or -1.

    Nothing is like a plain picture.
    """
    (ours, words), (theirs, among) = _parse_hashes(first), _parse_hashes(second)
    index = _Index(among, np.zeros(len(among), np.int64))
    best = np.full(len(words), NOTHING)
    for one, other, bits in index.compare_all(words[:, :2], np.full(len(words), NO_GROUP)):
        np.minimum.at(best, one, bits << 32 | other)
    found = best < NOTHING
    closest = np.full(len(first), -1)
    closest[ours[found]] = theirs[best[found] & 0xFFFFFFFF]
    return closest


def _join_alike(words: Words) -> Ints:
    """(hashes,) group numbers of (hashes, 4) words."""
    # a tenth of a second, which commands without such a search need not wait
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # in random order, so that the first hashes compared come from all large groups
    order = np.random.default_rng(0).permutation(len(words))
    groups = np.arange(len(words))
    index = _Index(words[order], groups)
    left_out = np.full(len(words), NO_GROUP)
    repeated = 0
    for one, other, _ in index.compare_all(words[order, :2], left_out):
        new = groups[one] != groups[other]
        if new.any():
            links = coo_array(
                (np.ones(new.sum()), (groups[one[new]], groups[other[new]])),
                shape=(len(words), len(words)),
            )
            groups = connected_components(links, directed=False)[1].astype(np.int64)[groups]
        repeated += int(np.count_nonzero(~new & (one != other)))
        if repeated > PAIRS_PER_SORT * len(words):
            index.sort(groups)
            left_out[:] = np.where(np.bincount(groups)[groups] < FEW, NO_GROUP, groups)
            repeated = 0
    joined = np.empty_like(groups)
    joined[order] = groups
    return joined


def _parse_hashes(hashes: Sequence[str]) -> tuple[Ints, Words]:
    """The positions of the hashes that are not plain, and (positions, 4) integers of each."""
    told = [at for at, text in enumerate(hashes) if DIGITS.fullmatch(text)]
    digits = bytes.fromhex("".join(hashes[at] for at in told))
    words = np.frombuffer(digits, ">u8").astype(np.uint64).reshape(-1, 4)
    return np.array(told, np.int64), words


class _Table(NamedTuple):
    """Hashes sorted by one quarter of their dhash, then by group."""

    keys: Ints  # (hashes,) the quarter and the group, sorted
    starts: Ints  # (65537,) where the hashes of each quarter begin, and the end
    order: Ints  # (hashes,) positions in the index
    dhashes: Words  # (hashes,) sorted too: reading them one after another is faster


class _Ranges(NamedTuple):
    """Hashes next to each other in a table, to be compared with one that is looked up."""

    rows: Ints  # (ranges,) positions of the hashes that are looked up
    starts: Ints
    stops: Ints


class _Index:
    """Tables that find (hashes, 4) words, as they are or mirrored, by quarters of their dhash."""

    def __init__(self, words: Words, groups: Ints) -> None:
        self.count = len(words)
        self.words = np.concatenate([words[:, :2], words[:, 2:]])
        self.sort(groups)

    def sort(self, groups: Ints) -> None:
        """Sort each table by quarter, then by (hashes,) `groups`: a look-up can leave one out."""
        self.tables: list[_Table] = []
        for quarter in _split(self.words[:, 0]).T:
            keys = quarter << 32 | np.tile(groups, 2)
            order = np.argsort(keys)
            starts = np.searchsorted(keys[order], np.arange((1 << 16) + 1) << 32)
            self.tables.append(_Table(keys[order], starts, order, self.words[order, 0]))

    def compare_all(self, words: Words, left_out: Ints) -> Iterator[Ints]:
        """Compare each of (queries, 2) words with all hashes, but for one group or NO_GROUP.

        Yields step by step (3, pairs): the positions in `words` and in the index of words that are
        alike, and the number of differing bits. A pair may come more than once, and pairs with the
        group that is left out may come too. After a step the caller may sort by other groups and
        change `left_out`.
        """
        done, count = 0, MAX_LOOK_UPS
        while done < len(words):
            step = slice(done, done + count)
            ranges = self._look_up(words[step, 0], left_out[step])
            pairs = sum(int((each.stops - each.starts).sum()) for each in ranges)
            if pairs > MAX_PAIRS and count > 1:
                count //= 2
                continue
            found = [
                self._compare(words[step], table, each)
                for table, each in zip(self.tables, ranges, strict=True)
            ]
            yield np.concatenate(found, axis=1) + np.array([[done], [0], [0]])
            done, count = done + count, min(2 * count, MAX_LOOK_UPS)

    def _look_up(self, dhashes: Words, left_out: Ints) -> list[_Ranges]:
        return [
            _find_ranges(table, quarter, left_out)
            for table, quarter in zip(self.tables, _split(dhashes).T, strict=True)
        ]

    def _compare(self, words: Words, table: _Table, ranges: _Ranges) -> Ints:
        lengths = ranges.stops - ranges.starts
        one = np.repeat(ranges.rows, lengths)
        # counts up from each start to its stop
        places = np.arange(len(one)) + np.repeat(ranges.stops - np.cumsum(lengths), lengths)
        bits = np.bitwise_count(words[one, 0] ^ table.dhashes[places])
        near = np.flatnonzero(bits <= MAX_DHASH_DISTANCE)
        one, other, bits = one[near], table.order[places[near]], bits[near].astype(np.int64)
        phash_bits = np.bitwise_count(words[one, 1] ^ self.words[other, 1])
        pairs = np.stack([one, other % self.count, bits + phash_bits])
        return pairs[:, phash_bits <= MAX_PHASH_DISTANCE]


def _split(dhashes: Words) -> Ints:
    """(hashes, 4) quarters of 16 bits."""
    bits = np.unpackbits(dhashes[:, None].view(np.uint8), axis=1)[:, BIT_ORDER]
    return np.packbits(bits).view(np.uint16).reshape(-1, 4).astype(np.int64)


def _find_ranges(table: _Table, quarters: Ints, left_out: Ints) -> _Ranges:
    """Ranges of the `quarters` and of their neighbours, without the groups that are left out."""
    probes = (quarters[:, None] ^ PROBES).ravel()
    rows = np.repeat(np.arange(len(quarters)), len(PROBES))
    starts, stops = table.starts[probes], table.starts[probes + 1]
    parted = np.flatnonzero((stops - starts >= FEW) & (left_out[rows] != NO_GROUP))
    group = probes[parted] << 32 | left_out[rows[parted]]
    # such a range becomes two: before the group, and after it
    after = (rows[parted], np.searchsorted(table.keys, group + 1), stops[parted])
    stops[parted] = np.searchsorted(table.keys, group)
    parts = zip((rows, starts, stops), after, strict=True)
    rows, starts, stops = (np.concatenate(part) for part in parts)
    filled = starts < stops
    return _Ranges(rows[filled], starts[filled], stops[filled])
