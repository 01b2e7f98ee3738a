"""Progress of long work on the console: done, rate, time left."""

from __future__ import annotations

import io
import sys
import threading
import time
from datetime import timedelta
from typing import TextIO


class ConsoleLine:
    """One line that is rewritten in place on a terminal; in a file, new lines now and then."""

    def __init__(self, stream: TextIO) -> None:
        self.live = stream.isatty()
        self._stream, self._line = stream, ""

    def update(self, text: str, prints: bool = True) -> None:
        """Shows `text` in place of the text before; in a file only where `prints`."""
        if self.live:
            self._line = text
            self._write(f"\r{text}\x1b[K")
        elif prints:
            self._write(f"{text}\n")

    def note(self, text: str) -> None:
        """Prints a line of its own, above the one that is rewritten."""
        self._write(f"\r\x1b[K{text}\n{self._line}" if self.live else f"{text}\n")

    def close(self) -> None:
        """Ends the line."""
        self._write("\n" if self._line else "")
        self._line = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def eta(seconds: float | None) -> str:
    """`ETA 01:23`, `ETA 1:01:23`; `ETA -` where the time left is not known."""
    clock = "-" if seconds is None else str(timedelta(seconds=round(seconds))).removeprefix("0:")
    return f"ETA {clock}"


def rate(value: float) -> str:
    """A number a second in three digits: `0.25`, `120`, `1.5k`."""
    return f"{value / 1e3:.1f}k" if value >= 999.5 else f"{value:.3g}"


class Progress:
    """Counts what is done, from any thread, and shows it on stderr with rate and time left.

    `total`: how many there are, where that is known. `scale`: how many of what is counted make one
    `unit`, as 1e9 bytes make a GB. `shown`: False says nothing, as one of many processes.
    """

    EVERY = 5.0  # seconds between lines in a file; a terminal's line is rewritten 5 times a second

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "samples",
        scale: float = 1.0,
        visible: bool = True,
    ) -> None:
        self._label, self._total, self._unit, self._scale = label, total, unit, scale
        self._done = 0
        self._first_share: float | None = None
        self._line = ConsoleLine(sys.stderr if visible else io.StringIO())
        self._start = self._printed_at = time.perf_counter()
        self._lock = threading.Lock()

    def step(self, count: int = 1, share: float | None = None, note: str = "") -> None:
        """`count` more are done; `share` (0..1) of the whole where no total is known."""
        with self._lock:
            self._done += count
            if self._total:
                share = self._done / self._total
            if self._first_share is None and share is not None:
                self._first_share = 0.0 if self._total else share
            now = time.perf_counter()
            if now - self._printed_at >= (0.2 if self._line.live else self.EVERY):
                self._printed_at = now
                self._line.update(self._text(now - self._start, share, note))

    def end(self, note: str = "") -> None:
        """The last line, with the total."""
        self._line.update(self.summary() + (f", {note}" if note else ""))
        self._line.close()

    def summary(self) -> str:
        """`toy data: 4000 samples in 13.2 s (303 samples/s)`."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        done = f"{self._amount(self._done)} {self._unit}"
        return f"{self._label}: {done} in {seconds:.1f} s ({self._rate(seconds)})"

    def _text(self, seconds: float, share: float | None, note: str) -> str:
        of = f"/{self._amount(self._total)}" if self._total else ""
        parts = [f"{self._label}: {self._amount(self._done)}{of} {self._unit}"]
        parts.append(self._rate(seconds))
        if share is not None:
            here = share - (self._first_share or 0.0)  # of it, in this process
            parts += [f"{share:.0%}", eta(seconds * (1 - share) / here if here > 0 else None)]
        return ", ".join([*parts, note] if note else parts)

    def _amount(self, count: int) -> str:
        return str(count) if self._scale == 1 else f"{count / self._scale:.2f}"

    def _rate(self, seconds: float) -> str:
        return f"{rate(self._done / self._scale / seconds)} {self._unit}/s"
