"""Differences of two runs, against figures of SciPy and of arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inference.evaluate.compare import ALL, Bootstrap, Difference, changed, compare, mcnemar
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
def test_mcnemars_p_is_that_of_the_exact_binomial_test(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-12)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


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
