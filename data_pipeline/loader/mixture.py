"""From which source is the next sample? Sources drawn by their weights, evenly, not at random.

Sample n of a run is from the source in whose part of [0, 1) the fractional part of
`start + n x golden ratio` lies: the sequence that fills [0, 1) most evenly. After n samples a share
is within about log(n) / n of its weight; so is each run of samples that a rank takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.loader.shuffle import GOLDEN, number

Numbers = NDArray[np.int64]


class Mixture:
    """Draws a source for each sample of a run, by its number alone.

    Fractions are whole numbers of 1 / 2^64, so that they are exact, and the same on any machine.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """`weights`: above 0, relative to each other."""
        parts = np.cumsum(np.asarray(weights, np.float64))
        ends = [min(int(end * 2.0**64), 2**64 - 1) for end in (parts[:-1] / parts[-1]).tolist()]
        self._ends = np.array(ends, np.uint64)
        self._start = np.uint64(number(seed, "mixture"))

    def sources(self, first: int, count: int) -> Numbers:
        """Indices of the sources of samples `first`, ..., `first + count - 1`."""
        place = self._start + np.arange(first, first + count, dtype=np.uint64) * GOLDEN  # mod 2^64
        return np.searchsorted(self._ends, place, side="right")

    def counts(self, first: int, count: int) -> Numbers:
        """How many of these samples each source gives."""
        return np.bincount(self.sources(first, count), minlength=len(self._ends) + 1)
