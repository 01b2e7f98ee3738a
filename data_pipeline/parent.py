"""Worker processes that end with the process that they work for, however that ends."""

from __future__ import annotations

import os
import threading
import time

INTERVAL = 0.5  # seconds between two looks


def end_with_parent() -> None:
    """Called in a worker: ends it at once when its parent has gone.

    A worker may wait for a lock that a killed parent or another worker held; nothing but its end
    frees it then. It also keeps its parent's sockets open, and so other ranks from noticing.
    """
    # Not multiprocessing.parent_process(): a fork server is the parent of what it forks.
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os._exit(1)
