"""The wall time of a run of two jobs, the first of which was killed, is divided without a rest."""

from __future__ import annotations

import pytest

from moss_train.train.goodput import PARTS, goodput_line, share, spent


def row(step: int, time: float, **more: float) -> dict:
    """A step of 2 s, half a second of which it waited for data."""
    return {"step": step, "time": time, "step_time_s": 2.0, "data_wait_s": 0.5, **more}


def test_every_second_has_one_part():
    history = [
        # Started at 100, first step from 110 to 112. Steps 1 to 4 end at 118; 3 and 4 are lost.
        {"event": "start", "step": 0, "started": 100.0, "time": 112.0, "lost_s": 0.0,
         "last_sign": 100.0},
        # Killed; started again 30 s later, first step (3) from 153 to 155.
        {"event": "start", "step": 2, "started": 148.0, "time": 155.0, "lost_s": 4.0,
         "last_sign": 118.0},
        {"event": "end", "step": 4, "time": 162.0},
    ]  # fmt: skip
    rows = [
        row(1, 112.0), row(2, 114.0), row(3, 155.0, validation_s=1.5), row(4, 158.5, save_s=0.5),
    ]  # fmt: skip
    found = spent(history, rows)
    assert found == pytest.approx(
        {
            "train": 6.0, "data": 2.0, "validation": 1.5, "save": 0.5, "start": 15.0, "lost": 4.0,
            "down": 30.0, "other": 3.0,
        }
    )  # fmt: skip
    assert found.keys() == PARTS.keys()
    assert sum(found.values()) == pytest.approx(162.0 - 100.0)
    assert share(found) == pytest.approx(6 / 62)
    assert goodput_line(found) == (
        "9.7% of 0:01:02 trained; down 48.4%, start 24.2%, lost 6.5%, other 4.8%, data 3.2%, "
        "validation 2.4%, save 0.8%"
    )


def test_a_run_of_an_earlier_version_has_none():
    assert spent([], [row(1, 1.0)]) == {}
    assert share({}) is None
