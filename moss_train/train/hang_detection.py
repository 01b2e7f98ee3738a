"""Whose silence is a hang, and who is furthest behind: what watchdogs decide (watchdog.py).

A rank of a step is silent for too long after `hardware.hang_s` seconds, or after five usual steps
where those are longer. Starting, loading, saving and waiting for data have `hardware.hang_io_s`: a
storage may be slow. While a rank does one of these, others may wait for it; a stopped process has
no such excuse.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from data_pipeline.tables import format_table
from moss_train.train.heartbeat import Heartbeat

IO = ("start", "load", "save", "data", "profile")  # signs of life with which these begin
USUAL_STEPS = 5  # a step may be longer than others: another length of samples, a validation
STOPPED = "stopped by a signal"  # a process, not running
ENDED_STATES = ("gone", "ended")  # processes


@dataclass(frozen=True)
class RankStatus:
    """A rank as its machine's watchdog sees it.

    count: signs of life in the step: of two ranks in the same step the one with fewer is behind.
    doing: as in `Heartbeat`. state: of the process. silent_s: seconds since the last sign of life.
    """

    rank: int
    host: str
    pid: int
    step: int
    count: int
    doing: str
    silent_s: float
    state: str


@dataclass(frozen=True)
class Limits:
    """Seconds of silence: in a step, in what waits for storage, and of a usual step so far."""

    step_s: float
    io_s: float
    usual_step_s: float | None = None  # None: no step has been seen

    def of(self, rank: RankStatus) -> float:
        """How long `rank` may be silent."""
        if rank.state == STOPPED:
            return self.step_s
        # Kernels are chosen and compiled in the first step, other process groups come into being.
        if self.usual_step_s is None or rank.doing in IO:
            return max(self.io_s, self.step_s)
        return max(self.step_s, USUAL_STEPS * self.usual_step_s)


class Pace:
    """How long a usual step takes: the median of the last ones that were seen."""

    def __init__(self) -> None:
        self._took: deque[float] = deque(maxlen=31)
        self._last: tuple[int, float] | None = None

    def add(self, beats: Sequence[Heartbeat], now: float) -> None:
        """`beats` at the time `now`."""
        if not beats:
            return
        step = beats[0].step
        if self._last is not None and step > self._last[0] > 0:
            self._took.append((now - self._last[1]) / (step - self._last[0]))
        if self._last is None or step != self._last[0]:
            self._last = step, now

    @property
    def usual_step_s(self) -> float | None:
        """Seconds of a usual step; None: no step has ended yet."""
        return median(self._took) if self._took else None


def hangs(ranks: Iterable[RankStatus], limits: Limits) -> bool:
    """Whether ranks have been silent for too long, and wait for none that may still be busy."""
    living = [rank for rank in ranks if rank.state not in ENDED_STATES]
    late = [rank for rank in living if rank.silent_s > limits.of(rank)]
    if any(rank.state == STOPPED for rank in late):
        return True
    step = max((rank.step for rank in late), default=0)
    busy = [
        rank
        for rank in living
        if rank.doing in IO and rank.step <= step and rank.silent_s <= limits.of(rank)
    ]
    return bool(late) and not busy


def furthest_behind(ranks: Sequence[RankStatus]) -> list[RankStatus]:
    """The ranks with the least progress; of ranks that are stopped, which all others wait for."""
    ranks = [rank for rank in ranks if rank.state == STOPPED] or ranks
    least = min((rank.step, rank.count) for rank in ranks)
    late = [rank for rank in ranks if (rank.step, rank.count) == least]
    return sorted(late, key=lambda rank: rank.rank)


def describe_late(ranks: Sequence[RankStatus]) -> str:
    """`furthest behind: rank 3 on node2 (step 12, after forward, silent for 61 s, waits)`"""
    late = furthest_behind(ranks)
    where = ", ".join(
        f"rank {rank.rank} on {rank.host} (step {rank.step}, {rank.doing}, silent for "
        f"{rank.silent_s:.0f} s, {rank.state})"
        for rank in late[:8]
    )
    more = f" and {len(late) - 8} more" if len(late) > 8 else ""
    return f"furthest behind: {where}{more}"


def verdict(ranks: Sequence[RankStatus], hang_s: float) -> str:
    """One line: the job hangs, and who is behind."""
    return f"the job hangs (hardware.hang_s={hang_s:g}): {describe_late(ranks)}"


def report(ranks: Sequence[RankStatus], hang_s: float) -> str:
    """`verdict`, and where each rank is."""
    rows = [("rank", "machine", "step", "doing", "silent s", "process")]
    rows += [
        (str(rank.rank), rank.host, str(rank.step), rank.doing, f"{rank.silent_s:.0f}",
         f"{rank.pid}, {rank.state}")
        for rank in sorted(ranks, key=lambda rank: (rank.step, rank.count, rank.rank))
    ]  # fmt: skip
    return f"{verdict(ranks, hang_s)}\n\n{format_table(rows, 'rlrlrl')}\n"
