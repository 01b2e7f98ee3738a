"""What other threads want done in the engine's thread, between two of its steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Call:
    """A function, and the future of what it returns. Whoever waits for that may give up and cancel
    it at any moment: the function is not called then, unless it has begun."""

    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except Exception as error:
            self.future.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """It will not be called."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
