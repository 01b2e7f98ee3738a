"""Which share of a run's wall time trained, and what took the rest.

From history.jsonl (when jobs started and ended, what was lost) and metrics.jsonl (each step that
counts). A run may have many jobs: time in which none ran is part of its wall time.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

PARTS = {
    "train": "steps that count, without their wait for data",
    "data": "waiting for data",
    "validation": "validation",
    "save": "saving, as far as training waits for it",
    "start": "from the start of a process to its first step",
    "lost": "steps that were done again, after a stop without a checkpoint",
    "down": "no job ran",
    "other": "the rest: the end of a job, reports",
}


@dataclass
class OutsideSteps:
    """Time that is spent outside of steps, for their lines of metrics.jsonl: see StepMetrics."""

    time: float = 0.0
    validation_s: float = 0.0
    save_s: float = 0.0

    def take(self) -> dict[str, Any]:
        """The fields; those of the next step begin at 0."""
        values = asdict(self)
        self.validation_s = self.save_s = 0.0
        return values

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time in which training waits for a save."""
        began = clock.perf_counter()
        try:
            yield
        finally:
            self.save_s += clock.perf_counter() - began


def spent(
    history: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Seconds of the run's wall time for each of PARTS; {} where the history has no start.

    Args:
        history: the entries of history.jsonl (history.py). rows: those of metrics.jsonl.
    """
    starts = [entry for entry in history if entry["event"] == "start"]
    rows = [row for row in rows if "time" in row]
    if not starts or not rows:
        return {}
    sums = {name: sum(row.get(f"{name}_s", 0.0) for row in rows) for name in ("validation", "save")}
    waited = sum(row["data_wait_s"] for row in rows)
    seconds = {
        "train": sum(row["step_time_s"] for row in rows) - waited,
        "data": waited,
        **sums,
        "start": sum(_start(entry, rows) for entry in starts),
        "lost": sum(entry["lost_s"] for entry in starts),
        "down": sum(max(0.0, entry["started"] - entry["last_sign"]) for entry in starts[1:]),
    }
    wall = max(rows[-1]["time"], history[-1]["time"]) - starts[0]["started"]
    return seconds | {"other": max(0.0, wall - sum(seconds.values()))}


def _start(entry: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from a process's start to its first step; the entry is written after that step."""
    first = next((row["step_time_s"] for row in rows if row["step"] == entry["step"] + 1), 0.0)
    return max(0.0, entry["time"] - entry["started"] - first)


def share(seconds: Mapping[str, float]) -> float | None:
    """The part of the wall time that trained, 0 to 1; None where nothing is known."""
    wall = sum(seconds.values())
    return seconds["train"] / wall if wall else None


def goodput_line(seconds: Mapping[str, float]) -> str:
    """`83.1 % of 1:23:45 trained; start 5.0 %, save 3.2 %`: what took a thousandth or more."""
    wall = sum(seconds.values())
    rest = sorted(((s, name) for name, s in seconds.items() if name != "train"), reverse=True)
    parts = [f"{name} {s / wall:.1%}" for s, name in rest if s >= wall / 1000]
    whole = timedelta(seconds=round(wall))
    return f"{seconds['train'] / wall:.1%} of {whole} trained; {', '.join(parts)}"
