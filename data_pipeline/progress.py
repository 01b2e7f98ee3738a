"""Progress of long work: a line on stderr that is rewritten, or, in a file, a new one at times."""

from __future__ import annotations

import sys
import time


class Progress:
    """Says how many are done, how fast, and how long it takes yet."""

    def __init__(self, label: str, total: int | None = None, unit: str = "samples") -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._first_share: float | None = None
        self._start = self._said = time.perf_counter()

    def step(self, count: int = 1, share: float | None = None, note: str = "") -> None:
        """`count` more are done; `share` (0..1) of the whole where no total is known."""
        self._done += count
        if self._total:
            share = self._done / self._total
        if self._first_share is None and share is not None:
            self._first_share = 0.0 if self._total else share
        now = time.perf_counter()
        if now - self._said >= (0.2 if sys.stderr.isatty() else 5):
            self._say(now, share, note)

    def end(self, note: str = "") -> None:
        """The last line, with the total."""
        self._say(time.perf_counter(), 1.0, note, last=True)

    def _say(self, now: float, share: float | None, note: str, last: bool = False) -> None:
        self._said = now
        seconds = max(now - self._start, 1e-9)
        of = f"/{self._total}" if self._total else ""
        line = f"{self._label}: {self._done}{of} {self._unit}, {self._done / seconds:.0f}/s"
        if share is not None and not last:
            gone = share - (self._first_share or 0.0)
            line += f", {share:.0%}"
            line += f", {seconds * (1 - share) / gone:.0f} s left" if gone > 0 else ""
        line += f", {note}" if note else ""
        if sys.stderr.isatty():
            line = f"\r{line}\x1b[K"
        sys.stderr.write(line if sys.stderr.isatty() and not last else f"{line}\n")
        sys.stderr.flush()
