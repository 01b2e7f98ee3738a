"""The end of loader processes: the training process decides when, or takes them with it."""

from __future__ import annotations

import os
import signal
import threading

from data_pipeline.parent import end_with_parent


def init_worker(parent: int, worker: int) -> None:
    """Runs first in loader process `worker`: afterwards only `parent` can end it with SIGTERM.

    The SIGTERM or SIGUSR1 of a batch system and Ctrl-C in a terminal go to all processes. Training
    then finishes its step, and needs its workers for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    end_with_parent(parent)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
