"""Where the time of some work goes: torch's profiler, in a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.profiler import profile

from data_pipeline import devices
from moss_train import hardware

TOP = 15  # kernels that are listed
LONG_GAP_MS = 0.05


@dataclass
class Profile:
    """What the device did (on a CPU: what torch did), in milliseconds.

    span_ms: from the first kernel's begin to the last one's end; busy_ms: of it, with a kernel.
    launches: kernels and copies. top: (name, ms, launches) of those that took longest in all.
    gaps: (ms, kernel before, kernel after) of the longest times without a kernel.
    """

    span_ms: float = 0.0
    busy_ms: float = 0.0
    launches: int = 0
    top: list[tuple[str, float, int]] = field(default_factory=list)
    gaps: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def idle(self) -> float:
        """The share of the span in which the device waited for the host."""
        return 1 - self.busy_ms / self.span_ms if self.span_ms else 0.0


def profiled(work: Callable[[], Any]) -> Profile:
    """Runs `work` under the profiler."""
    with profile(activities=[devices.activity(hardware.device())]) as watched:
        work()
        hardware.synchronize()
    return summarize(device_spans(watched))


def device_spans(watched: profile) -> Iterator[tuple[str, float, float]]:
    """(Name, begin, end) in ms of all that the device did; on a CPU of torch's outermost calls."""
    device_type = devices.event_type(hardware.device())
    for event in watched.events() or []:
        if event.device_type == device_type and event.cpu_parent is None:
            yield event.name, event.time_range.start / 1e3, event.time_range.end / 1e3


def summarize(spans: Iterable[tuple[str, float, float]]) -> Profile:
    """The profile of (name, begin, end) in milliseconds, in any order; they may overlap."""
    ordered = sorted(spans, key=lambda span: span[1])
    if not ordered:
        return Profile()
    sums: dict[str, tuple[float, int]] = {}
    gaps: list[tuple[float, str, str]] = []
    busy, latest, before = 0.0, ordered[0][1], ""
    for name, begin, end in ordered:
        spent, count = sums.get(name, (0.0, 0))
        sums[name] = (spent + end - begin, count + 1)
        if begin - latest > LONG_GAP_MS:
            gaps.append((begin - latest, before, name))
        busy += max(0.0, end - max(begin, latest))
        if end >= latest:
            latest, before = end, name
    top = sorted(((name, *sums[name]) for name in sums), key=lambda row: -row[1])
    return Profile(
        latest - ordered[0][1], busy, len(ordered), top[:TOP], sorted(gaps, reverse=True)[:TOP]
    )
