"""Times that people write: one parser for questions, records and Python."""

from __future__ import annotations

import pytest

from data_pipeline.seconds import clock, parse_seconds


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (3, 3.0), (0.5, 0.5), ("3", 3.0), ("12.5", 12.5), (".5", 0.5), ("3s", 3.0), (" 3 s ", 3.0),
        ("00:03", 3.0), ("1:30", 90.0), ("00:03.5", 3.5), ("75:00", 4500.0), ("1:5", 65.0),
        ("1:02:03", 3723.0), ("1:02:03.5", 3723.5), ("0\uff1a30", 30.0),
    ],
)  # fmt: skip
def test_a_time_is_seconds(written: object, seconds: float) -> None:
    assert parse_seconds(written) == seconds


@pytest.mark.parametrize(
    "written",
    ["", "now", "nan", "inf", "-1", "1e3", "+3", "1_0", "3,5", "3m", "1:", ":30", "1:75", "1:75:00",
     "1:2:3:4", "1:-5", "1:30s", float("nan"), float("inf"), -0.5, True, None, [3]],
)  # fmt: skip
def test_what_is_not_a_time_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="is not a time from 0 on: write 3, "):
        parse_seconds(written)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "00:00"), (75.2, "01:15"), (59.9999999, "01:00"), (3723, "1:02:03")]
)
def test_what_the_view_shows_can_be_written(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
    assert parse_seconds(shown) == int(seconds + 1e-6)
