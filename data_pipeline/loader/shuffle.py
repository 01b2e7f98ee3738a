"""The order of a source's samples: which one is its p-th, epoch after epoch?

Shards are cut into pieces. An epoch has all pieces in a random order, and takes its samples from
windows of that order, a window after the other, each shuffled. So reads stay within the pieces of a
window, and only numbers are shuffled: there is no buffer of samples to be filled.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_PIECE = 100  # samples of one shard that lie side by side, at most

Numbers = NDArray[np.int64]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio's fraction, in 1 / 2^64


def number(*named: object) -> int:
    """64 random bits that depend on the arguments alone."""
    text = " ".join(map(str, named)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def permutation(count: int, key: int) -> Numbers:
    """0..count - 1 in a random order: by numbers of SplitMix64 (Steele, Lea and Flood 2014).

    numpy's own permutations may change from one version to the next.
    """
    x = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


class SourceOrder:
    """The order of a source whose shards have `counts` samples, numbered through all shards."""

    def __init__(self, name: str, counts: Numbers, seed: int, window: int) -> None:
        """`window`: samples that are mixed with each other; 0: the order of the shards."""
        self._named, self._window = (seed, name), window
        self.samples = int(counts.sum())
        of_shard = -(-counts // _PIECE)
        before = np.repeat(np.cumsum(of_shard) - of_shard, of_shard)  # pieces of earlier shards
        inside = (np.arange(of_shard.sum()) - before) * _PIECE
        self._first = np.repeat(np.cumsum(counts) - counts, of_shard) + inside
        self._length = np.minimum(np.repeat(counts, of_shard) - inside, _PIECE)
        self._pieces = lru_cache(maxsize=1)(self._shuffled_pieces)
        self._inside = lru_cache(maxsize=1)(self._shuffled_window)

    def sample(self, position: int) -> int:
        """The number of the sample that comes at `position`: 0, 1, ..., without end."""
        epoch, place = divmod(position, self.samples)
        if self._window == 0:
            return place
        window, inside = divmod(place, self._window)
        place = window * self._window + int(self._inside(epoch, window)[inside])
        first, ends = self._pieces(epoch)
        piece = int(np.searchsorted(ends, place, side="right"))
        return int(first[piece]) + place - int(ends[piece - 1] if piece else 0)

    def _shuffled_pieces(self, epoch: int) -> tuple[Numbers, Numbers]:
        """For each piece in an epoch's order: its first sample, and the number of samples up to its
        end."""
        order = permutation(len(self._first), number(*self._named, epoch))
        return self._first[order], np.cumsum(self._length[order])

    def _shuffled_window(self, epoch: int, window: int) -> Numbers:
        size = min(self._window, self.samples - window * self._window)
        return permutation(size, number(*self._named, epoch, window))
