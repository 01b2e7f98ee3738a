"""Makes the parts of an import by processes of this machine, one process a part.

A process that is killed costs its part, which is made again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from data_pipeline.engines.job import Job, make_part
from data_pipeline.parent import end_with_parent
from data_pipeline.shards import ShardError

_FORK = multiprocessing.get_context("fork")  # a process a part must start in no time


def run_local(job: Job, workers: int, retries: int, done: Callable[[int], None]) -> None:
    """Makes the parts that are missing, calling `done` after each; at most `workers` at a time.

    Raises ShardError where a part fails, or its process is killed more than `retries` times, and
    what `done` raises.
    """
    waiting, deaths = deque(job.missing()), Counter[int]()
    # By the pipe for the process's error, which closes with the process. A long error waits in
    # there until it is read.
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                _start(job, waiting.popleft(), running)
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                number, process = running.pop(pipe)
                if _made(process, pipe):
                    done(number)
                    continue
                deaths[number] += 1
                if deaths[number] > retries:
                    raise ShardError(
                        f"part {number}: its process was killed {deaths[number]} times (exit code "
                        f"{process.exitcode}; out of memory?): use fewer --workers"
                    )
                waiting.append(number)
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _start(job: Job, number: int, running: dict[Connection, tuple[int, ForkProcess]]) -> None:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_work, args=(job, number, theirs, os.getpid()))
    process.start()
    theirs.close()
    running[ours] = (number, process)


def _made(process: ForkProcess, pipe: Connection) -> bool:
    """Whether a process that ends made its part; its error is raised here."""
    error: Exception | None = None
    with suppress(EOFError, OSError), pipe:  # the latter: it is killed while it says an error
        error = pipe.recv()
    process.join()
    if error is not None:
        raise error
    return process.exitcode == 0


def _work(job: Job, number: int, pipe: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent's
    end_with_parent(parent)
    try:
        make_part(job, number)
    except MemoryError:
        pipe.send(ShardError(f"part {number}: not enough memory: use fewer --workers"))
    except (ShardError, OSError) as error:
        pipe.send(ShardError(f"part {number}: {error}"))
    except Exception as error:
        traceback.print_exc()  # a fault of ours: this says where
        pipe.send(ShardError(f"part {number}: {type(error).__name__}: {error}"))
