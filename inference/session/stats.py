"""A session's measurements: counts, and the last 1024 values of each duration."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from typing import Any

# Seconds: from a prompt's arrival to the first token after it; between two tokens of a response;
# from taking a frame in to its decision; from a frame's arrival to taking it in; from a prompt's
# arrival until it is in the context.
DURATIONS = ("ttft", "inter_token", "frame_decision", "frame_lag", "interruption")
# Dropped frames are counted as `drop:REASON`, decisions on frames by their names.
# `input_tokens`: given to the model, one for each frame among them; `tokens`: of its responses.
COUNTS = ("frames", "input_tokens", "tokens", "responses", "evicted_frame", "evicted_text")
DECISIONS = ("silence", "speech")
Measure = Callable[[str, float], None]

_KEPT = 1024


class Stats:
    """Counts and durations of one session. `measured(name, value)` is called with every count and
    every duration."""

    def __init__(self, measured: Measure | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.began = time.monotonic()
        self._kept = {name: deque[float](maxlen=_KEPT) for name in DURATIONS}
        self._measured = measured

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] += number
        if self._measured:
            self._measured(name, number)

    def add(self, name: str, seconds: float) -> None:
        """Adds a duration."""
        self._kept[name].append(seconds)
        if self._measured:
            self._measured(name, seconds)

    @property
    def seconds(self) -> float:
        """Since the session was opened."""
        return time.monotonic() - self.began

    def usage(self) -> dict[str, float]:
        """What the session has used so far."""
        return usage_of(self.counts, self.seconds)

    def summary(self) -> dict[str, Any]:
        """Counts, the share of silent decisions, and p50 and p99 in milliseconds."""
        counts = self.counts
        drops = {name[5:]: n for name, n in counts.items() if name.startswith("drop:")}
        decisions = counts["silence"] + counts["speech"]
        summary: dict[str, Any] = {
            **{name: counts[name] for name in COUNTS},
            "drops": drops,
            "silence_ratio": round(counts["silence"] / decisions, 4) if decisions else None,
        }
        for name, values in self._kept.items():
            if values:
                summary[f"{name}_ms"] = {
                    f"p{share}": round(1000 * quantile(values, share), 3) for share in (50, 99)
                }
        gaps = self._kept["inter_token"]
        summary["tokens_per_second"] = round(len(gaps) / sum(gaps), 2) if sum(gaps) else None
        return summary


def usage_of(counts: Mapping[str, int], seconds: float) -> dict[str, float]:
    """A session's usage, as events and logs tell it."""
    return {
        "frames": counts.get("frames", 0),
        "input_tokens": counts.get("input_tokens", 0),
        "output_tokens": counts.get("tokens", 0),
        "seconds": round(seconds, 3),
    }


def quantile(values: Collection[float], percent: int) -> float:
    """The value that so many percent of the values do not exceed, one of them."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
