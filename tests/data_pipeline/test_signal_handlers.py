"""Handlers hold as long as they are wanted, and no worker process depends on its parent's."""

from __future__ import annotations

import signal
import threading

import pytest

from data_pipeline.importers.pool import Pool
from data_pipeline.signal_handlers import handling
from tests.waiting import PATIENCE


def raise_both() -> None:
    signal.raise_signal(signal.SIGUSR1)
    raise KeyError


def test_what_was_called_before_is_called_afterwards() -> None:
    came: list[str] = []
    with handling([signal.SIGUSR1], lambda *_: came.append("outer")):
        with pytest.raises(KeyError), handling([signal.SIGUSR1], lambda *_: came.append("inner")):
            raise_both()
        signal.raise_signal(signal.SIGUSR1)
    assert came == ["inner", "outer"]


def test_another_thread_handles_none() -> None:
    within = []

    def work() -> None:
        with handling([signal.SIGTERM], signal.SIG_IGN):
            within.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert within == [before]


def test_workers_of_an_import_end_whatever_the_program_does_on_sigterm() -> None:
    with handling([signal.SIGTERM], lambda *_: None):
        pool = Pool(2)
        workers = list(pool._processes)
        closing = threading.Thread(target=pool.close, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        try:
            assert not closing.is_alive()
        finally:
            for worker in workers:
                worker.kill()
    assert None not in [worker.exitcode for worker in workers]
