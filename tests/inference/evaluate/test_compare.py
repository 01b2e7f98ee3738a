"""Differences of two runs, against figures of SciPy and of arithmetic."""

from __future__ import annotations

import math
import operator
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from inference.evaluate.compare import (
    ALL,
    Bootstrap,
    Difference,
    changed,
    compare,
    exact_p,
    not_compared,
)
from inference.evaluate.results import BenchmarkError, Item


def row(scores: list[float], **more: object) -> dict[str, Item]:
    return {
        str(n): {"id": str(n), "score": score, "correct": score == 1, **more}
        for n, score in enumerate(scores)
    }


# scipy 1.17.1: scipy.stats.binomtest(min(a, b), a + b, 0.5).pvalue
@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (59, 121, 4.4344492637551645e-06), (0, 5, 0.0625), (3, 3, 1.0), (1, 9, 0.021484375),
        (700, 650, 0.1823103494670065), (0, 0, 1.0),
    ],
)  # fmt: skip
def test_the_p_of_single_items_is_that_of_the_exact_binomial_test(gained, lost, p):
    net = [1] * gained + [-1] * lost
    assert exact_p(net) == pytest.approx(p, rel=1e-12)
    assert exact_p([-one for one in net]) == exact_p(net)


@pytest.mark.parametrize("net", [[3, 1, 1, 0, -2], [5], [2, 2, -2, -2], [4, 3, 2, 1, 1], []])
def test_the_p_of_groups_is_that_of_all_their_signs(net):
    """By counting: each group's gains and losses could have been the other way round."""
    sums = [abs(sum(map(operator.mul, net, signs))) for signs in product((1, -1), repeat=len(net))]
    assert exact_p(net) == pytest.approx(sum(one >= abs(sum(net)) for one in sums) / len(sums))


def test_the_p_of_many_groups_is_exact_to_its_last_digits():
    """Against sums of whole numbers: each group's sign doubles the number of cases."""
    net = [1] * 420 + [-1] * 500 + [2] * 60 + [-3] * 11
    cases = {0: 1}
    for size in map(abs, net):
        new: dict[int, int] = {}
        for total, count in cases.items():
            for moved in (total - size, total + size):
                new[moved] = new.get(moved, 0) + count
        cases = new
    far = sum(count for total, count in cases.items() if abs(total) >= abs(sum(net)))
    assert exact_p(net) == pytest.approx(far / 2 ** len(net), rel=1e-11)
    few = 2 * sum(math.comb(3000, heads) for heads in range(1401)) / 2**3000
    assert exact_p([1] * 1600 + [-1] * 1400) == pytest.approx(few, rel=1e-11)


def test_the_interval_is_that_of_the_normal_distribution_for_many_items():
    rng = np.random.default_rng(5)
    a, b = (list(rng.integers(0, 2, 4000).astype(float)) for _ in range(2))
    (found,) = compare({"r": row(a)}, {"r": row(b)}, Bootstrap(resamples=20_000))
    difference = np.array(b) - np.array(a)
    half = 1.959964 * difference.std() / math.sqrt(4000)
    assert found.difference == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.03 * half)
    again = compare({"r": row(a)}, {"r": row(b)}, Bootstrap(resamples=20_000))
    assert again == [found]


def test_questions_about_one_video_are_drawn_together():
    a, b = [0.0, 1, 0, 1, 1, 0, 0, 1] * 5, [1.0, 1, 0, 0, 1, 1, 0, 1] * 5
    alone = compare({"r": row(a)}, {"r": row(b)})[0]
    many = [
        {
            f"{n}-{copy}": {"id": "", "score": score, "media": [f"{n}.mp4"]}
            for n, score in enumerate(scores)
            for copy in range(3)
        }
        for scores in (a, b)
    ]
    copied = compare({"r": many[0]}, {"r": many[1]})[0]
    assert copied.count == 3 * alone.count
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


def clips(scores: list[float], key: str = "media") -> dict[str, Item]:
    """An item about each of so many clips, or pictures without a file."""
    return {n: {**item, key: [f"{n}.mp4"]} for n, item in row(scores).items()}


@pytest.mark.parametrize("key", ["media", "pictures"])
def test_rows_about_the_same_media_are_no_more_evidence_than_one_of_them(key):
    """All that two rows say about the same clips, they say in one."""
    rng = np.random.default_rng(3)
    a, b = (clips(rng.integers(0, 2, 300).astype(float).tolist(), key) for _ in range(2))
    (alone,) = compare({"r": a}, {"r": b})
    twice = compare({"r": a, "s": a}, {"r": b, "s": b})[-1]
    apart = {n: {**item, key: [f"other {n}"]} for n, item in a.items()}
    independent = compare({"r": a, "s": apart}, {"r": b, "s": {
        n: {**item, key: [f"other {n}"]} for n, item in b.items()
    }})[-1]  # fmt: skip
    width = alone.high - alone.low
    assert twice.row == independent.row == ALL
    assert twice.high - twice.low == pytest.approx(width, rel=0.03)
    assert independent.high - independent.low == pytest.approx(width / math.sqrt(2), rel=0.05)
    assert alone.gained
    assert twice.gained == 2 * alone.gained
    assert twice.p == pytest.approx(alone.p)


def test_rows_that_share_some_of_their_media_vary_as_their_groups_do():
    """The variance of a mean of rows, from the sums over clips (Cochran, Sampling Techniques)."""
    rng = np.random.default_rng(11)
    a, b = (list(rng.integers(0, 2, 600).astype(float)) for _ in range(2))
    left, right = slice(0, 400), slice(200, 600)
    runs = [
        {"r": dict(list(clips(x).items())[left]), "s": dict(list(clips(x).items())[right])}
        for x in (a, b)
    ]
    both = compare(runs[0], runs[1])[-1]
    difference = np.array(b) - np.array(a)
    weight = np.zeros(600)
    weight[left] += 1 / 800
    weight[right] += 1 / 800
    spread = math.sqrt(sum(
        (weight[part] * difference[part]).var() * 200
        for part in (slice(0, 200), slice(200, 400), slice(400, 600))
    ))  # fmt: skip
    assert both.difference == pytest.approx(float(weight @ difference))
    assert both.high - both.low == pytest.approx(2 * 1.959964 * spread, rel=0.05)


def test_media_each_in_rows_of_its_own_vary_as_any_others():
    """Each clip is in three rows of seven, no two clips in the same ones: 35 sets of rows. By the
    sums over clips: the spread of what each adds to the mean, less the mean of its rows."""
    rng = np.random.default_rng(2)
    sets, sizes = list(combinations(range(7), 3)), Counter[int]()
    for places in sets:
        sizes.update(places)
    runs: list[dict[str, dict[str, Item]]] = [{str(n): {} for n in range(7)} for _ in range(2)]
    found = np.full((len(sets), 7), np.nan)
    for clip, places in enumerate(sets):
        level = rng.normal()
        for place in places:
            found[clip, place] = level + 0.3 * rng.normal()
            for run, score in zip(runs, (0.0, found[clip, place]), strict=True):
                run[str(place)][str(clip)] = {"score": score, "media": [f"{clip}.mp4"]}
    both = compare(runs[0], runs[1])[-1]
    means = np.nanmean(found, axis=0)
    parts = np.nansum((found - means) / 15 / 7, axis=1)
    assert set(sizes.values()) == {15}
    assert both.difference == pytest.approx(means.mean())
    spread = math.sqrt((parts**2).sum())
    assert both.high - both.low == pytest.approx(2 * 1.959964 * spread, rel=0.08)


def test_views_of_a_row_do_not_count_again():
    first = {"x": row([1, 0]), "x (turns)": row([1, 1, 0, 0]), "y": row([0, 0])}
    second = {"x": row([1, 1]), "x (turns)": row([1, 1, 1, 1]), "y": row([0, 0])}
    *_, both = compare(first, second, views={"x (turns)"})
    assert (both.first, both.second, both.count, both.gained) == (0.25, 0.5, 4, 1)


def test_other_questions_under_the_same_ids_are_not_compared():
    """Data of another version: the ids are numbers of lines."""
    old = row([1, 1, 0, 0], reference="A", media=["/old/1.mp4"])
    new = row([0, 0, 1, 1], reference="A", media=["/new/1.mp4"])
    (found,) = compare({"r": old}, {"r": new})
    assert found.count == 4
    new["1"]["reference"] = "B"
    new["2"]["media"] = ["/new/2.mp4"]
    (found,) = compare({"r": old}, {"r": new})
    assert (found.count, found.only_first, found.only_second) == (2, 2, 2)
    first, second = {"r": old, "s": row([1])}, {"r": new, "t": row([1]), "u": {"0": {"id": "0"}}}
    assert not_compared(first, second) == ["s", "t"]


def test_only_shared_items_are_compared_and_the_others_counted():
    first = {"x": row([1, 0, 0, 1, 1]), "y": row([1, 1]), "lost": row([1])}
    second = {"x": row([1, 1, 0, 0]), "y": row([0, 0, 0]), "new": row([0])}
    first["x"]["1"]["score"] = None
    x, y, both = compare(first, second)
    assert (x.count, x.only_first, x.only_second) == (3, 1, 1)
    assert (x.first, x.second, x.gained, x.lost, x.p) == (2 / 3, 1 / 3, 0, 1, 1.0)
    assert (y.count, y.only_second, y.lost, y.p) == (2, 1, 2, 0.5)
    assert both.row == ALL
    assert (both.first, both.second) == (pytest.approx((2 / 3 + 1) / 2), pytest.approx(1 / 6))
    assert (both.count, both.lost, both.p) == (5, 3, 0.25)
    assert changed(first["x"], second["x"]) == ["3"]


def test_scores_that_are_not_right_or_wrong_have_no_test():
    grades = [row([0.5, 0.25]), row([0.5, 0.75])]
    for grade in grades:
        for item in grade.values():
            del item["correct"]
    (found,) = compare({"r": grades[0]}, {"r": grades[1]})
    assert isinstance(found, Difference)
    assert (found.difference, found.gained, found.p) == (0.25, None, None)


def test_runs_of_other_suites_are_refused():
    with pytest.raises(BenchmarkError, match="share no item"):
        compare({"a": row([1])}, {"b": row([1])})
