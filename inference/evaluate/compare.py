"""Compares two evaluations of the same items: how far they differ, and whether by chance.

Only items that both answered are compared. Items that show the same media are not independent, in
whichever rows they stand; they are a group. The interval is that of a paired Bayesian bootstrap
over groups (Rubin, The Bayesian Bootstrap, Annals of Statistics 9, 1981): each group has a random
weight, the same in all rows. Unlike a count of draws it is never 0: no row is ever without items.
The p-value is that of the exact test in which each group could as well have had its gains and
losses the other way round; where each item is a group of its own, that is McNemar's (Psychometrika
12, 1947).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

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
    only_first: int  # items that only one of the runs answered, or of which it has another one
    only_second: int
    first: float  # mean score over the shared items
    second: float
    low: float  # confidence interval of second - first
    high: float
    gained: int | None = None  # items that turned right; None: scores are not right or wrong
    lost: int | None = None  # items that turned wrong
    p: float | None = None  # of the exact test

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
    views: Collection[str] = (),
) -> list[Difference]:
    """The difference in each row that both runs have; of several rows also their mean, last.

    first, second: items by row and id, as `read_items` returns them. views: rows that are not part
    of the mean (`Row.view`). BenchmarkError: the two runs share no scored item.
    """
    rows = [row for row in first if _shared(first[row], second.get(row, {}))]
    if not rows:
        raise BenchmarkError("the runs share no item with a score: compare runs of one suite")
    rng = np.random.default_rng(bootstrap.seed)
    differences, groups = [], list[_Groups]()
    for row in rows:
        one, other = first[row], second[row]
        ids = _shared(one, other)
        own = _grouped([(one[name], other[name]) for name in ids])
        interval = _interval(_draw([own], bootstrap, rng), bootstrap.level)
        differences.append(_difference(row, one, other, ids, own, interval))
        groups.append(own)
    mains = [number for number, row in enumerate(rows) if row not in views]
    if len(mains) > 1:
        parts, grouped = [differences[n] for n in mains], [groups[n] for n in mains]
        interval = _interval(_draw(grouped, bootstrap, rng), bootstrap.level)
        differences.append(_together(parts, grouped, interval))
    return differences


def exact_p(net: Sequence[int]) -> float:
    """The two-sided p-value: how probable a sum is that is as far from 0, or farther, where each
    term has either sign with the same probability. `net`: items gained less items lost of each
    group."""
    sizes = Counter(abs(term) for term in net if term)
    total = sum(sizes.elements())
    chances = np.ones(1)  # of the sum of the positive terms, from 0 to `total`
    for size, count in sizes.items():
        spread = np.zeros(size * count + 1)
        spread[::size] = _heads(count)
        chances = np.convolve(chances, spread)
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(chances[sums >= abs(sum(net))].sum()))


def _heads(throws: int) -> NDArray[np.float64]:
    """The probability of each number of heads in so many throws of a coin `[throws + 1]`."""
    heads = np.arange(throws - throws // 2, throws)
    half = np.concatenate([[1.0], np.cumprod((throws - heads) / (heads + 1))])
    whole = np.concatenate([half[::-1] if throws % 2 else half[:0:-1], half])
    found: NDArray[np.float64] = whole / whole.sum()
    return found


def changed(first: Mapping[str, Item], second: Mapping[str, Item]) -> list[str]:
    """Ids of a row's items whose scores differ between the two runs."""
    ids = _shared(first, second)
    return [name for name in ids if first[name]["score"] != second[name]["score"]]


def not_compared(
    first: Mapping[str, Mapping[str, Item]], second: Mapping[str, Mapping[str, Item]]
) -> list[str]:
    """Rows with scores in either run of which the two share none."""
    runs = [
        {row for row, items in run.items() if any(map(_scored, items.values()))}
        for run in (first, second)
    ]
    shared = {row for row in first if _shared(first[row], second.get(row, {}))}
    return sorted((runs[0] | runs[1]) - shared)


def _shared(first: Mapping[str, Item], second: Mapping[str, Item]) -> list[str]:
    """Ids of the items that have a score in both, and are the same question."""
    return [
        name
        for name, item in first.items()
        if _scored(item) and _scored(other := second.get(name, {})) and _same(item, other)
    ]


def _scored(item: Item) -> bool:
    return item.get("score") is not None


def _same(one: Item, other: Item) -> bool:
    """Whether two items of one id ask the same: about files of the same names, about the same
    pictures, with the same reference. Another prompt is no other question."""
    files = [[PurePath(path).name for path in item.get("media") or ()] for item in (one, other)]
    if files[0] != files[1]:
        return False
    keys = [key for key in ("reference", "pictures") if key in one and key in other]
    return all(one[key] == other[key] for key in keys)


def _difference(
    row: str,
    first: Mapping[str, Item],
    second: Mapping[str, Item],
    ids: Sequence[str],
    groups: _Groups,
    interval: tuple[float, float],
) -> Difference:
    before, after = (
        math.fsum(run[name]["score"] for name in ids) / len(ids) for run in (first, second)
    )
    only_first, only_second = (
        sum(map(_scored, run.values())) - len(ids) for run in (first, second)
    )
    pairs = [(first[name].get("correct"), second[name].get("correct")) for name in ids]
    gained = lost = p = None
    if all(isinstance(value, bool) for pair in pairs for value in pair):
        gained, lost = pairs.count((False, True)), pairs.count((True, False))
        p = exact_p([group.net for group in groups.values()])
    low, high = interval
    return Difference(
        row, len(ids), only_first, only_second, before, after, low, high, gained, lost, p
    )


def _together(
    rows: Sequence[Difference], groups: Sequence[_Groups], interval: tuple[float, float]
) -> Difference:
    """The difference of the mean of all rows, each with the same weight whatever its number of
    items. The test is over all items."""
    before = math.fsum(r.first for r in rows) / len(rows)
    after = math.fsum(r.second for r in rows) / len(rows)
    count, only_first, only_second = (
        sum(getattr(r, name) for r in rows) for name in ("count", "only_first", "only_second")
    )
    tested = [(r, own) for r, own in zip(rows, groups, strict=True) if r.p is not None]
    gained = lost = p = None
    if tested:
        gained, lost = (
            sum(getattr(r, name) or 0 for r, _ in tested) for name in ("gained", "lost")
        )
        together = _over_rows([own for _, own in tested])
        p = exact_p([sum(part.net for part in parts) for _, parts in together])
    low, high = interval
    return Difference(
        ALL, count, only_first, only_second, before, after, low, high, gained, lost, p
    )


@dataclass
class _Group:
    """Items about the same media."""

    difference: float = 0.0  # sum of the scores' differences
    count: int = 0
    net: int = 0  # items gained less items lost


# By media, or by number where an item has none.
_Groups = dict[object, _Group]


def _grouped(pairs: Sequence[tuple[Item, Item]]) -> _Groups:
    groups: _Groups = {}
    for number, (one, other) in enumerate(pairs):
        pictures = one.get("pictures") or other.get("pictures") or ()
        media = (*(one.get("media") or ()), *pictures)
        group = groups.setdefault(media or number, _Group())
        group.difference += float(other["score"]) - float(one["score"])
        group.count += 1
        group.net += (other.get("correct") is True) - (one.get("correct") is True)
    return groups


def _draw(
    rows: Sequence[_Groups], bootstrap: Bootstrap, rng: np.random.Generator
) -> NDArray[np.float64]:
    """The mean difference of each resample `[resamples]`, of several rows the mean of their means.

    All that counts of a group is the sum of its differences and its size, in each row. The weight
    of n groups that are equal in these is the sum of n weights, exponentials, which is a gamma of
    shape n: fast for 100,000 items. A row's mean is free of the weights' scale.
    """
    kinds_of: dict[tuple[int, ...], list[list[float]]] = {}  # by the rows that a group is in
    for places, parts in _over_rows(rows):
        numbers = [x for part in parts for x in (part.difference, part.count)]
        kinds_of.setdefault(places, []).append(numbers)
    sums = np.zeros((bootstrap.resamples, len(rows), 2))
    for places, found in kinds_of.items():
        kinds, counts = np.unique(np.array(found), axis=0, return_counts=True)
        step = max(1, _AT_ONCE // len(kinds))
        for start in range(0, bootstrap.resamples, step):
            part = slice(start, start + step)
            size = len(sums[part])
            drawn = rng.standard_gamma(counts, (size, len(kinds))) @ kinds
            sums[part, list(places)] += drawn.reshape(size, len(places), 2)
    means: NDArray[np.float64] = (sums[..., 0] / sums[..., 1]).mean(axis=1)
    return means


def _over_rows(rows: Sequence[_Groups]) -> Iterator[tuple[tuple[int, ...], list[_Group]]]:
    """Each group, wherever it is: the numbers of its rows, and its part in each of them."""
    found: dict[object, list[tuple[int, _Group]]] = {}
    for number, groups in enumerate(rows):
        for key, group in groups.items():
            unique = key if isinstance(key, tuple) else (number, key)
            found.setdefault(unique, []).append((number, group))
    for parts in found.values():
        yield tuple(number for number, _ in parts), [group for _, group in parts]


def _interval(draws: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
