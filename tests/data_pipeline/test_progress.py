"""The console's line of long work."""

from __future__ import annotations

import io
import re

import pytest

from data_pipeline import progress
from data_pipeline.progress import ConsoleLine, Progress, eta, rate


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the next look at the clock shows."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_done_rate_share_and_time_left(clock, capsys):
    shown = Progress("toy data", total=400)
    clock[0] = 10.0
    shown.step(100)
    shown.step(100)  # at the same moment: no line is due
    clock[0] = 40.0
    shown.step(200, note="2 rejected")
    shown.end()
    assert capsys.readouterr().err.splitlines() == [
        "toy data: 100/400 samples, 10 samples/s, 25%, ETA 00:30",
        "toy data: 400/400 samples, 10 samples/s, 100%, ETA 00:00, 2 rejected",
        "toy data: 400 samples in 40.0 s (10 samples/s)",
    ]


def test_work_of_unknown_length_that_goes_on_where_it_stood(clock, capsys):
    """Half was done before: the time left is that of the other half."""
    shown = Progress("import", unit="records")
    clock[0] = 1.0
    shown.step(share=0.5)
    clock[0] = 11.0
    shown.step(share=0.6)
    assert capsys.readouterr().err == "import: 2 records, 0.182 records/s, 60%, ETA 00:44\n"


def test_bytes_are_shown_in_their_unit(clock):
    shown = Progress("copy", total=8_000_000_000, unit="GB", scale=1e9)
    clock[0] = 4.0
    shown.step(3_000_000_000)
    assert shown.summary() == "copy: 3.00 GB in 4.0 s (0.75 GB/s)"


def test_a_terminal_has_one_line_with_notes_above_it():
    stream = Terminal()
    line = ConsoleLine(stream)
    line.update("one")
    line.note("saved")
    line.update("two")
    line.close()
    assert re.sub(r"\x1b\[K", "", stream.getvalue()) == "\rone\rsaved\none\rtwo\n"


def test_times_and_rates_are_short():
    assert [eta(s) for s in (None, 83.4, 3683.0)] == ["ETA -", "ETA 01:23", "ETA 1:01:23"]
    assert [rate(r) for r in (0.2512, 32.0, 999.4, 1500.0)] == ["0.251", "32", "999", "1.5k"]
