"""How what owns a thread, or other ranks, ends where nobody closes it: with the last reference to
it, or with the process; and what a copy of that process (`os.fork`) may do with it."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

_LAST = 10.0  # seconds in which threads must end before the process does
_COPY = (
    "this process is a copy (fork) of the one that has loaded the model, and has not its threads: "
    "load the model in this process, or start it with multiprocessing's spawn or forkserver"
)


class ProcessLock(threading.Condition):
    """A lock of the process that has made it. In a copy nobody may ever give it back, and nobody
    answers who waits: there RuntimeError says so."""

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()

    @property
    def copied(self) -> bool:
        """Whether this process is a copy of its own."""
        return os.getpid() != self._process

    def check(self) -> None:
        """RuntimeError in a copy."""
        if self.copied:
            raise RuntimeError(_COPY)

    def __enter__(self) -> bool:
        self.check()
        return super().__enter__()


class Closable(Protocol):
    """Owns a thread."""

    def close(self, reason: str, seconds: float) -> None:
        """Ends the thread, and waits so long for it."""


def close_at_exit(owner: Closable) -> None:
    """Closes the owner when the program ends, if nobody has: a thread that computes while the
    interpreter ends aborts the process. What was to be done at exit before this call is done after
    it: an engine tells its other ranks to end when no thread uses it any more."""
    atexit.register(_close, weakref.ref(owner))


def _close(reference: weakref.ref[Closable]) -> None:
    owner = reference()
    if owner is not None:
        with contextlib.suppress(Exception):
            owner.close("the program ends", _LAST)


def when_forgotten(owner: object, end: Callable[[], Any]) -> None:
    """Calls `end` once nobody refers to the owner any more; it must not refer to it itself. In a
    thread of its own: garbage is collected in the middle of anything, also where locks are held."""
    weakref.finalize(owner, _in_thread, end).atexit = False


def _in_thread(end: Callable[[], Any]) -> None:
    # Python 3.12 starts none while the program ends, which closes everything itself.
    with contextlib.suppress(RuntimeError):
        _thread.start_new_thread(end, ())
