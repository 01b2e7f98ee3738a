"""Where the time of a step goes, without a wait for the device."""

from __future__ import annotations

import time
from typing import Any

from moss_train import hardware
from moss_train.train.heartbeat import beat

NAMES = ("encode", "plan", "forward", "backward", "exchange", "update")


class Phases:
    """Seconds of a step's phases on this rank, from one `end` to the next.

    On a GPU they are measured by events among its work: what the host does beside it does not
    count, what the device waits for does. On a CPU by the clock.
    """

    def __init__(self) -> None:
        """Begins the first phase."""
        self._on_accelerator = hardware.on_accelerator()
        beat("encode")
        self._ends: list[tuple[str, Any]] = [("", self._now())]

    def end(self, name: str) -> None:
        """Ends phase `name`, which may come several times, and begins the next one."""
        self._ends.append((name, self._now()))
        beat(f"after {name}")

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase. On a GPU the step's results must have been waited for."""
        sums = dict.fromkeys(NAMES, 0.0)
        for (_, begin), (name, end) in zip(self._ends, self._ends[1:], strict=False):
            sums[name] += _between(begin, end)
        return sums

    def _now(self) -> Any:
        if not self._on_accelerator:
            return time.perf_counter()
        event = hardware.new_event(timing=True)
        event.record()
        return event


def _between(begin: Any, end: Any) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not isinstance(begin, float)
    assert not isinstance(end, float)
    return begin.elapsed_time(end) / 1e3
