"""Decides which part of a video is watched around a question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """How long a video is watched before and after a question."""

    context: float | None = None  # seconds before it; None: all
    patience: float = 10.0  # seconds after it, in which an answer may begin

    def start(self, second: float) -> float:
        """The second from which the video is watched, for a question at `second`."""
        return 0.0 if self.context is None else max(0.0, second - self.context)

    def end(self, second: float) -> float:
        """The second up to which the video is watched, for a question at `second`."""
        return second + self.patience
