"""The seconds of a live source: its stamps as long as they go as the wall clock does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inference.live_clock import Grid, LiveClock

Frames = Sequence[tuple[float | None, float]]  # (stamp, wall clock when it came)


def told(frames: Frames) -> tuple[list[float], list[int]]:
    """The second of each frame, and the numbers of those at which the clock has jumped."""
    clock, jumps, seconds = LiveClock(), [], []
    for number, (stamp, now) in enumerate(frames):
        seconds.append(round(clock.second(stamp, now), 6))
        if clock.jump:
            jumps.append(number)
    return seconds, jumps


TEN: list[tuple[float, float]] = [(i / 10, i / 10) for i in range(10)]  # a second, ten frames
# What a source sends -> the second of its last frame, and where its clock jumps.
TABLE: dict[str, tuple[Frames, float, list[int]]] = {
    "stamps from 0": (TEN, 0.9, []),
    "stamps of the time of day": ([(1.7e9 + i, 50.0 + i) for i in range(10)], 9.0, []),
    "no stamps, five a second": ([(None, 7 + i / 5) for i in range(26)], 5.0, []),
    "no stamps, uneven": ([(None, t) for t in (3.0, 3.1, 5.5, 5.6, 8.0)], 5.0, []),
    "a burst of two seconds": ([(i / 10, 0.0) for i in range(21)], 2.0, []),
    "late by a stall, then all at once": (
        [*TEN, *((1 + i / 10, 4 + i / 1000) for i in range(31))], 4.0, [],
    ),
    "a pause in which nothing is sent": ([*TEN, (9.0, 9.0)], 9.0, []),
    "restarts at 0": ([*TEN, (0.0, 1.0), (0.1, 1.1)], 1.1, [10]),
    "ten hours ahead": ([*TEN, (36000.0, 1.0), (36000.1, 1.1)], 1.1, [10]),
    "ten hours ahead, once": ([*TEN, (36000.0, 1.0), (1.1, 1.1)], 1.1, [10, 11]),
    "a step back of two frames": ([*TEN, (0.8, 1.0), (1.1, 1.1)], 1.1, []),
    "stands still, then goes on from there": (
        [*TEN, *((1 + i, 5 + i) for i in range(8))], 12.0, [16],
    ),
    "a stamp is missing": ([*TEN, (None, 1.0), (1.1, 1.1)], 1.1, []),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_second_of_a_live_frame(name: str) -> None:
    frames, last, jumps = TABLE[name]
    seconds, jumped = told(frames)
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    assert (seconds[-1], jumped) == (last, jumps)


@pytest.mark.parametrize("rate", [1, 5, 25])
@pytest.mark.parametrize(("fast", "stored"), [(1e-3, 0.0), (0.0, 4.0), (-1e-3, 0.0), (0.0, 0.0)])
def test_a_reader_that_keeps_to_the_seconds_stays_close(
    fast: float, stored: float, rate: int
) -> None:
    """Of a source whose clock is off by a thousandth, and of one that begins with what it has."""
    clock, grid = LiveClock(), Grid(1.0)
    now = late = 0.0
    for number in range(2 * 3600 * rate):
        asked, made = now, max(0.0, number / rate - stored)
        now = max(asked, made)
        second = clock.second(number / rate * (1 + fast), now, now - asked)
        if grid.take(second) is not None:
            now = max(now, second)
        late = now - made
        if number == 1800 * rate:
            assert late < 4.1
    assert late < 1.1
    assert second == pytest.approx(number / rate - stored, abs=1.6)


def test_what_is_stored_keeps_its_own_seconds() -> None:
    """A file on the network is all there from the start."""
    clock = LiveClock(3600.0)
    assert [clock.second(float(s), float(s), None) for s in range(600)] == list(range(600))


def test_after_a_new_connection_the_seconds_go_on() -> None:
    clock = LiveClock()
    for stamp, now in TEN:
        clock.second(100 + stamp, now)
    clock.restart()
    assert clock.second(3.0, 5.0) == pytest.approx(5.0)
    assert clock.jump == 0
    assert clock.second(3.5, 5.5) == pytest.approx(5.5)


def test_what_somebody_else_says_goes_on_with_the_wall_clock() -> None:
    clock = LiveClock()
    clock.set(30.0, 100.0)
    assert clock.second(None, 102.5) == 32.5


@pytest.mark.parametrize("rate", [0.5, 1, 3, 5, 25, 50])
@pytest.mark.parametrize("fps", [1, 2])
def test_so_many_frames_a_second_are_chosen(rate: float, fps: int) -> None:
    """Of frames that come up to a tenth of their gap too early or late."""
    grid = Grid(fps)
    off = [0, 0.1, -0.1, 0.05, -0.1, 0.1, -0.05]
    came = [0.0, *((i + off[i % 7]) / rate for i in range(1, int(20 * rate)))]
    chosen = [second for now in came if (second := grid.take(now)) is not None]
    assert chosen[0] == 0
    assert len(chosen) == pytest.approx(20 * min(rate, fps), abs=1)
    assert chosen == sorted(set(chosen))
    if rate >= fps:
        assert all(abs(s - i / fps) <= 1.1 / rate for i, s in enumerate(chosen))
