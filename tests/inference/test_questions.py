"""`--ask SECOND:TEXT`: which part is the time."""

from __future__ import annotations

import argparse

import pytest

from inference.realtime_streaming_infer import question


@pytest.mark.parametrize(
    ("written", "second", "text"),
    [
        ("12.5:Where is it?", 12.5, "Where is it?"),
        ("00:03:What is it?", 3, "What is it?"),
        ("1:30: What?", 90, "What?"),
        ("1:02:03:What?", 3723, "What?"),
        ("00:03.5:What?", 3.5, "What?"),
        ("3s:What?", 3, "What?"),
        ("3 : What: this?", 3, "What: this?"),
        ("3\uff1aWhat?", 3, "What?"),
        ("0\uff1a30\uff1aWhat?", 30, "What?"),
        ("3: 30 people?", 3, "30 people?"),  # a space ends the time
        ("3: 4:30 or later?", 3, "4:30 or later?"),
        ("12.5:30 people?", 12.5, "30 people?"),  # no minutes have a fraction
        ("3:2 people?", 3, "2 people?"),
        ("3:100 people?", 3, "100 people?"),
        ("3:99 people?", 3, "99 people?"),  # no seconds after minutes
        ("3:one\ntwo", 3, "one\ntwo"),
    ],
)
def test_as_much_as_may_be_a_time_is_one(written: str, second: float, text: str) -> None:
    assert question(written) == (second, text)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("what", "write SECOND:TEXT"),
        ("What: this?", "'What' is not a time"),
        (":What?", "'' is not a time"),
        ("nan:What?", "'nan' is not a time"),
        ("inf:What?", "'inf' is not a time"),
        ("-1:What?", "'-1' is not a time"),
        ("1:75:What?", "'1:75' is not a time"),
        ("1:2:3:4:What?", "'1:2:3:4' is not a time"),
        ("3:", "there is no text after the time 3"),
        ("00:03: ", "there is no text after the time 00:03"),
        ("1:30 What?", "may be 1 or 1:30: write '1: 30 What?' or '1:30:TEXT'"),
        ("1:30", "may be 1 or 1:30"),
        ("1:02:03 What?", "may be 1:02 or 1:02:03"),
    ],
)
def test_what_is_not_a_time_or_two_is_refused(written: str, problem: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        question(written)
    assert problem in str(refused.value)
