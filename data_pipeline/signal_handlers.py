"""Handlers of signals that hold for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None


@contextmanager
def handling(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Within, these signals call `handler`; afterwards, what they called before. Processes that are
    forked later would otherwise have it, too.

    Python calls handlers in the main thread alone, and sets them there: in others nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in before.items():
            if one is not None:  # else a library's own, which Python cannot set
                signal.signal(number, one)
