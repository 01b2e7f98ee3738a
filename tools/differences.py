"""How far apart numbers are that must agree: one that is NaN must not pass for an agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable


def largest(differences: Iterable[float]) -> float:
    """The largest of them, 0 of none; NaN where one is. `max` drops a NaN that is not the first, so
    that a loss which is no number would be within any tolerance."""
    found = list(differences)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def relative(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """The largest relative difference of numbers in pairs, of which `theirs` are not 0."""
    return largest(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
