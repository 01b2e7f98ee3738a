"""Signals in loader processes: the training process decides when they stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def init_worker(inner: Callable[[int], None] | None, worker: int) -> None:
    """Runs first in a loader process: afterwards only its parent can end it with SIGTERM.

    The SIGTERM of a batch system and Ctrl-C in a terminal go to all processes. Training then
    finishes its step and saves the position in the data, and needs its workers for both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()
    if inner is not None:
        inner(worker)


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
