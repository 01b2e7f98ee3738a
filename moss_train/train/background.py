"""Work in a background thread, whose result is asked for later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from data_pipeline import devices
from moss_train import hardware

T = TypeVar("T")


class BackgroundWork(Generic[T]):
    """Calls `work` in a thread, at once; `result` waits for it and returns what it returned.

    The thread does not keep the process from ending.
    """

    def __init__(self, work: Callable[[], T], name: str):
        """Starts the thread; `name`: what tools that list threads call it."""
        self._work, self._device = work, hardware.device()
        self._done: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            devices.use(self._device)
            self._done.append(self._work())
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended, well or not, within `seconds` (None: however long it takes)."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Waits for it. Raises what `work` has raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._done.pop()
