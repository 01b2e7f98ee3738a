"""`trainer.profile`: some steps under torch's profiler, and a page of what it saw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from data_pipeline import devices
from data_pipeline.atomic import write_atomically
from data_pipeline.page import render
from moss_train import hardware
from moss_train.log import log
from moss_train.storage import or_warning
from moss_train.train.heartbeat import beat
from moss_train.train.trace import Profile, device_spans, summarize

ALLOCATIONS = 200_000  # that a memory snapshot goes back at most


class StepProfiler:
    """Watches the steps [first, last] of a run on this rank, and writes what it saw to a folder.

    trace.json.gz: for chrome://tracing or ui.perfetto.dev. memory.pickle (on a GPU): for
    docs.pytorch.org/memory_viz. profile.html: the kernels that took longest, and the longest gaps.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """`steps`: None for none."""
        self.steps, self.folder = steps, folder
        self._watched: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """The time of step `number`. Of a step that fails nothing is written."""
        if self.steps is None or not self.steps[0] <= number <= self.steps[1]:
            yield
            return
        if self._watched is None:
            self._start()
            self._first = number
        yield
        if number == self.steps[1]:
            self._finish(number)

    def _start(self) -> None:
        activities = {ProfilerActivity.CPU, devices.activity(hardware.device())}
        hardware.record_allocations(ALLOCATIONS)
        self._watched = profile(activities=activities)
        self._watched.__enter__()

    def _finish(self, last: int) -> None:
        hardware.synchronize()
        watched, self.steps = self._watched, None
        beat("profile")  # minutes, where many kernels ran
        watched.__exit__(None, None, None)
        with or_warning(self.folder):
            self._write(watched, last)
        hardware.record_allocations(None)

    def _write(self, watched: Any, last: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        watched.export_chrome_trace(str(self.folder / "trace.json.gz"))
        hardware.dump_allocations(self.folder / "memory.pickle")
        page = profile_page(summarize(device_spans(watched)), self._first, last)
        write_atomically(self.folder / "profile.html", page)
        log.info("steps %d to %d are profiled in %s", self._first, last, self.folder)


def profile_page(profile: Profile, first: int, last: int) -> str:
    """The page of steps `first` to `last`."""
    span = profile.span_ms or 1.0
    return render(
        "profile.html.jinja",
        Path(__file__).parent,
        title=f"Steps {first} to {last}",
        what=[
            hardware.device_name(),
            f"{profile.span_ms:.1f} ms",
            f"{profile.launches:,} launches",
            f"{profile.idle:.0%} of the time without one",
        ],
        top=[(name, f"{ms:.2f}", f"{ms / span:.1%}", f"{n:,}") for name, ms, n in profile.top],
        gaps=[(f"{ms:.2f}", before, after) for ms, before, after in profile.gaps],
    )
