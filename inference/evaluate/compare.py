"""Compares two evaluations of the same items: how far they differ, and whether by chance.

Only items that both answered are compared. The interval is that of a paired bootstrap over groups
of items that show the same media (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): questions about one video are not independent. The p-value is McNemar's exact test
(McNemar, Psychometrika 12, 1947): of the items that one run has right and the other wrong, half
would be on each side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from inference.evaluate.results import BenchmarkError, Item

_AT_ONCE = 2**22  # numbers of the bootstrap that are held in memory at the same time
ALL = "all rows"


@dataclass(frozen=True)
class Difference:
    """How a row, or the mean of all rows (`ALL`), differs between two runs."""

    row: str
    count: int  # items that both runs answered
    only_first: int  # items that only one of the runs answered
    only_second: int
    first: float  # mean score over the shared items
    second: float
    low: float  # confidence interval of second - first
    high: float
    gained: int | None = None  # items that turned right; None: scores are not right or wrong
    lost: int | None = None  # items that turned wrong
    p: float | None = None  # McNemar's p-value

    @property
    def difference(self) -> float:
        return self.second - self.first


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap."""

    seed: int = 0
    resamples: int = 10_000
    level: float = 0.95  # confidence level of the interval


def compare(
    first: Mapping[str, Mapping[str, Item]],
    second: Mapping[str, Mapping[str, Item]],
    bootstrap: Bootstrap = Bootstrap(),
) -> list[Difference]:
    """The difference in each row that both runs have; of several rows also their mean, last.

    first, second: items by row and id, as `read_items` returns them. BenchmarkError: the two runs
    share no scored item.
    """
    rows = [row for row in first if row in second and _shared(first[row], second[row])]
    if not rows:
        raise BenchmarkError("the runs share no item with a score: compare runs of one suite")
    rng = np.random.default_rng(bootstrap.seed)
    differences, draws = [], []
    for row in rows:
        one, other = first[row], second[row]
        ids = _shared(one, other)
        drawn = _draw([one[name] for name in ids], [other[name] for name in ids], bootstrap, rng)
        draws.append(drawn)
        interval = _interval(drawn, bootstrap.level)
        differences.append(_difference(row, one, other, ids, interval))
    if len(rows) > 1:
        interval = _interval(np.mean(draws, axis=0), bootstrap.level)
        differences.append(_together(differences, interval))
    return differences


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value: the probability of min(gained, lost) or fewer heads, or of as
    few tails, in gained + lost throws of a fair coin."""
    count, least = gained + lost, min(gained, lost)
    term, total = 1, 0
    for k in range(least + 1):
        total += term
        term = term * (count - k) // (k + 1)
    return min(1.0, 2 * total / 2**count)


def changed(first: Mapping[str, Item], second: Mapping[str, Item]) -> list[str]:
    """Ids of a row's items whose scores differ between the two runs."""
    ids = _shared(first, second)
    return [name for name in ids if first[name]["score"] != second[name]["score"]]


def _shared(first: Mapping[str, Item], second: Mapping[str, Item]) -> list[str]:
    """Ids of the items that have a score in both."""
    return [
        name
        for name, item in first.items()
        if item.get("score") is not None and second.get(name, {}).get("score") is not None
    ]


def _difference(
    row: str,
    first: Mapping[str, Item],
    second: Mapping[str, Item],
    ids: Sequence[str],
    interval: tuple[float, float],
) -> Difference:
    before, after = (
        math.fsum(run[name]["score"] for name in ids) / len(ids) for run in (first, second)
    )
    only_first, only_second = (
        sum(item.get("score") is not None for item in run.values()) - len(ids)
        for run in (first, second)
    )
    pairs = [(first[name].get("correct"), second[name].get("correct")) for name in ids]
    gained = lost = p = None
    if all(isinstance(value, bool) for pair in pairs for value in pair):
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        p = mcnemar(gained, lost)
    low, high = interval
    return Difference(
        row, len(ids), only_first, only_second, before, after, low, high, gained, lost, p
    )


def _together(rows: Sequence[Difference], interval: tuple[float, float]) -> Difference:
    """The difference of the mean of all rows, each with the same weight whatever its number of
    items. McNemar's test is over all items."""
    before = math.fsum(r.first for r in rows) / len(rows)
    after = math.fsum(r.second for r in rows) / len(rows)
    count, only_first, only_second = (
        sum(getattr(r, name) for r in rows) for name in ("count", "only_first", "only_second")
    )
    tested = [r for r in rows if r.p is not None]
    gained = lost = p = None
    if tested:
        gained, lost = sum(r.gained or 0 for r in tested), sum(r.lost or 0 for r in tested)
        p = mcnemar(gained, lost)
    low, high = interval
    return Difference(
        ALL, count, only_first, only_second, before, after, low, high, gained, lost, p
    )


def _draw(
    first: Sequence[Item], second: Sequence[Item], bootstrap: Bootstrap, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The mean difference of each resample `[resamples]`.

    All that counts of a group is the sum of its differences and its size. Groups that are equal in
    both are drawn together, from a multinomial distribution: the same, and fast for 100,000 items.
    """
    groups: dict[object, list[float]] = {}
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        media = tuple(one.get("media") or ())
        group = groups.setdefault(media or number, [0.0, 0.0])
        group[0] += float(other["score"]) - float(one["score"])
        group[1] += 1
    kinds, counts = np.unique(np.array(list(groups.values())), axis=0, return_counts=True)
    share, parts = counts / counts.sum(), []
    step = max(1, _AT_ONCE // len(kinds))
    for start in range(0, bootstrap.resamples, step):
        size = min(step, bootstrap.resamples - start)
        drawn = rng.multinomial(counts.sum(), share, size=size) @ kinds
        parts.append(drawn[:, 0] / drawn[:, 1])
    return np.concatenate(parts)


def _interval(draws: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
