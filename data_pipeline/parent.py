"""Lets a process end with the one that has started it, or that it works for, however that ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

INTERVAL = 0.5  # seconds between two looks
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent(parent: int) -> None:
    """Called in a worker: ends it at once when its parent has gone.

    A worker may wait for a lock that a killed parent or another worker held; nothing but its end
    frees it then. It also keeps its parent's sockets open, and so other ranks from noticing.

    parent: the process that started the worker. It may have gone before this is called.
    """
    # Not multiprocessing.parent_process(): its pipe stays open in the parent's other forks.
    if multiprocessing.get_start_method() == "forkserver":
        parent = os.getppid()  # the server forks, and ends when `parent` does
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os._exit(1)


def signalled_with_parent(parent: int, how: int = signal.SIGKILL) -> None:
    """The system sends this process `how` when `parent` (its thread that has started this process)
    ends; this process ends at once where that is no longer its parent. On Linux; elsewhere nothing.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
    if os.getppid() != parent:  # it ended before this was asked for
        os._exit(1)
