"""Workers that finish entries side by side and hand them over in their order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from data_pipeline.importers.draft import Entry
from data_pipeline.importers.media import MediaOptions, Outcome, finish
from data_pipeline.shards import ShardError

# Entries travel in chunks of about so much work; a video is a chunk of its own.
_WORK = {"text": 1, "image": 4, "video": 64, "realtime": 64}
_CHUNK = 64


class Pool:
    """`workers` processes; 0: everything happens in this one."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor = ProcessPoolExecutor(workers, initializer=_init) if workers else None
        if self._executor is not None:
            # All processes start now, before this one has connections that they must not share.
            self._executor.submit(int).result()

    def finish(self, entries: Iterable[Entry], options: MediaOptions) -> Iterator[Outcome]:
        """The outcomes, in the order of the entries. ShardError where a worker dies."""
        if self._executor is None:
            yield from (finish(entry, options) for entry in entries)
            return
        running: deque[Future[list[Outcome]]] = deque()
        try:
            for chunk in _chunks(entries):
                running.append(self._executor.submit(_finish_all, chunk, options))
                if len(running) > 2 * self._workers:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        except BrokenProcessPool:
            raise ShardError(
                "a worker was killed (out of memory?): the same command goes on, with fewer "
                "--workers if need be"
            ) from None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    work = 0
    for entry in entries:
        chunk.append(entry)
        work += _WORK[entry.group]
        if work >= _CHUNK:
            yield chunk
            chunk, work = [], 0
    if chunk:
        yield chunk


def _finish_all(chunk: list[Entry], options: MediaOptions) -> list[Outcome]:
    return [finish(entry, options) for entry in chunk]


def _init() -> None:
    """Runs first in a worker: it leaves Ctrl-C to its parent and ends when that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
