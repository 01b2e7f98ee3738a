"""Which part of a source is watched around a question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """context: seconds before a question that are watched; None: all. patience: seconds after it in
    which an answer may begin."""

    context: float | None = None
    patience: float = 10.0

    def start(self, second: float) -> float:
        return 0.0 if self.context is None else max(0.0, second - self.context)

    def end(self, second: float) -> float:
        return second + self.patience
