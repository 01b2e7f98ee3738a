"""Worker processes that finish entries in parallel; the results keep the entries' order.

Each worker has a pipe of its own, which closes when the worker is killed, so that its parent knows.
(ProcessPoolExecutor waits for ever for the rest of a result that a killed worker was sending.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import torch

from data_pipeline.importers.draft import Entry
from data_pipeline.importers.media import MediaOptions, Outcome, finish
from data_pipeline.parent import end_with_parent
from data_pipeline.shards import ShardError

# Relative cost of an entry. Entries are sent in chunks of cost _CHUNK: a video makes one alone.
_WORK = {"text": 1, "image": 4, "video": 64, "realtime": 64}
_CHUNK = 64
_AHEAD = 3  # finished chunks for each worker that may wait for an earlier one


class Pool:
    """`workers` processes; 0: this process does the work.

    They start at once, before this process has opened connections that they must not share.
    """

    def __init__(self, workers: int) -> None:
        self._processes = []
        self._pipes: list[Connection] = []
        for _ in range(workers):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()  # so that the pipe closes with the worker
            self._processes.append(process)
            self._pipes.append(ours)

    def finish(self, entries: Iterable[Entry], options: MediaOptions) -> Iterator[Outcome]:
        """The outcomes, in the order of the entries. ShardError where a worker dies."""
        if not self._pipes:
            yield from (finish(entry, options) for entry in entries)
            return
        chunks = enumerate(_chunks(entries))
        idle, busy = list(self._pipes), dict[Connection, int]()
        done: dict[int, list[Outcome]] = {}
        following, exhausted = 0, False
        while busy or done or not exhausted:
            while idle and not exhausted and len(busy) + len(done) < _AHEAD * len(self._pipes):
                number, chunk = next(chunks, (0, None))
                exhausted = chunk is None
                if chunk is not None:
                    pipe = idle.pop()
                    _send(pipe, (chunk, options))
                    busy[pipe] = number
            for ready in wait(list(busy)) if following not in done and busy else ():
                assert isinstance(ready, Connection)
                done[busy.pop(ready)] = _receive(ready)
                idle.append(ready)
            if following in done:
                yield from done.pop(following)
                following += 1

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            # Not SIGTERM: a fork has this process's handler of it, which may do anything.
            process.kill()
            process.join()


def _send(pipe: Connection, task: tuple[list[Entry], MediaOptions]) -> None:
    try:
        pipe.send(task)
    except OSError:
        raise _killed() from None


def _receive(pipe: Connection) -> list[Outcome]:
    try:
        result: list[Outcome] | ShardError = pipe.recv()
    except (EOFError, OSError):
        raise _killed() from None
    if isinstance(result, ShardError):
        raise result
    return result


def _killed() -> ShardError:
    return ShardError(
        "a worker was killed (out of memory?): the same command goes on, with fewer --workers if "
        "need be"
    )


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


def _work(pipe: Connection, parent: int) -> None:
    """The main loop of a worker. Ctrl-C is its parent's; it ends when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    end_with_parent(parent)
    with suppress(EOFError, OSError):  # the parent has no more work
        while True:
            chunk, options = pipe.recv()
            try:
                result = _finish_all(chunk, options)
            except Exception as error:
                traceback.print_exc()  # a fault of ours: this says where
                result = ShardError(f"{chunk[0].key}: {type(error).__name__}: {error}")
            pipe.send(result)


def _finish_all(chunk: list[Entry], options: MediaOptions) -> list[Outcome] | ShardError:
    try:
        return [finish(entry, options) for entry in chunk]
    except ShardError as error:
        return error
    except MemoryError:
        return ShardError(f"{chunk[0].key}: not enough memory: use fewer --workers")
