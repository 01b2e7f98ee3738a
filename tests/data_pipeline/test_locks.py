"""Locks of files are given back when their holder says so, also where it has forked meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from data_pipeline.block_cache import BlockCache
from data_pipeline.engines.collect import _alone
from data_pipeline.importers.journal import Journal
from data_pipeline.synthesis.store import Store
from inference.evaluate.results import EvaluationRun


@contextmanager
def _journal(folder: Path) -> Iterator[None]:
    journal = Journal(folder, {})
    yield
    journal.close()


@contextmanager
def _store(folder: Path) -> Iterator[None]:
    store = Store(folder)
    yield
    store.close()


HOLDERS: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "blocks of stores": lambda folder: BlockCache(folder, 1)._total(),
    "import": _journal,
    "parts of an import": _alone,
    "synthesis": _store,
    "evaluation": lambda folder: EvaluationRun(folder, "http://model", "suite", {}),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_a_fork_that_goes_on_does_not_hold_the_lock(
    hold: Callable[[Path], AbstractContextManager[object]], tmp_path: Path
) -> None:
    ended, end = os.pipe()
    with hold(tmp_path):
        fork = os.fork()
        if not fork:
            os.close(end)
            os.read(ended, 1)  # until the test closes its end
            os._exit(0)
    try:
        with hold(tmp_path):
            pass
    finally:
        os.close(end)
        os.waitpid(fork, 0)
        os.close(ended)
