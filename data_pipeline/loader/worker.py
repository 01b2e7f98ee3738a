"""Loader processes and signals: the trainer decides when a job stops, not its data workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def init_worker(inner: Callable[[int], None] | None, worker: int) -> None:
    """Runs first in a loader process: only its parent can end it with SIGTERM.

    A batch system's SIGTERM and a terminal's Ctrl-C go to all processes. The trainer wants to
    finish its step then, and to save where the data stands: it needs its workers for both.
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
