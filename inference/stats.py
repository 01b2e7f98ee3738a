"""What a session measures, kept over its last thousand values."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

# Seconds each: of a prompt until the first token after it, between two tokens of a speech, of a
# frame from being taken in to its decision, of a frame from its arrival to being taken in, of a
# prompt until it stands in the context.
MEASURES = ("ttft", "inter_token", "frame_decision", "frame_lag", "interruption")
Measure = Callable[[str, float], None]

_KEPT = 1024


class Stats:
    """Counts and durations of a session. `measured(name, seconds)` is told every duration."""

    def __init__(self, measured: Measure | None = None) -> None:
        self.frames = 0
        self.decisions = 0
        self.silences = 0
        self.tokens = 0
        self.responses = 0
        self.evicted = 0
        self.drops: Counter[str] = Counter()
        self._kept = {name: deque[float](maxlen=_KEPT) for name in MEASURES}
        self._measured = measured

    def add(self, name: str, seconds: float) -> None:
        self._kept[name].append(seconds)
        if self._measured:
            self._measured(name, seconds)

    def summary(self) -> dict[str, Any]:
        """Counts, the share of silent decisions, and p50 and p99 in milliseconds."""
        found: dict[str, Any] = {
            "frames": self.frames,
            "tokens": self.tokens,
            "responses": self.responses,
            "evicted_frames": self.evicted,
            "drops": dict(self.drops),
            "silence_ratio": round(self.silences / self.decisions, 4) if self.decisions else None,
        }
        for name, values in self._kept.items():
            if values:
                ordered = sorted(values)
                found[f"{name}_ms"] = {
                    p: round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
                    for p, share in (("p50", 0.5), ("p99", 0.99))
                }
        gaps = self._kept["inter_token"]
        found["tokens_per_second"] = round(len(gaps) / sum(gaps), 2) if sum(gaps) else None
        return found
