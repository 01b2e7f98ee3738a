"""Processes that decode clients' media: as many as wanted, each with one task at a time.

A task that takes too long, or whose client has left, ends with its process, and another process is
started; so does a task that takes more memory or processor time than it may, or finds a fault in a
decoder. Processes are forked from one that has the imports and nothing else of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
from torch import Tensor

from data_pipeline.schema import SampleError
from inference.serve.decoding import Task, work
from inference.serve.limits import Refused

log = logging.getLogger(__name__)

_LOOK = 0.05  # seconds between looks at whether the client has left
_CLOSING = "the server is shutting down"
_LAST = 2.0  # seconds in which a process must end when the server does
# Imported once, in the process from which the others are forked.
_IMPORTED = ["inference.serve.decoding", "inference.serve.__main__"]  # which is light


@dataclass(eq=False)
class _Job:
    """A task on its way. on_frame: is called with the bytes of each frame, may raise Refused."""

    task: Task
    seconds: float
    on_frame: Callable[[int], None]
    future: Future[list[Tensor]] = field(default_factory=Future)
    abandoned: bool = False


def prepare() -> None:
    """Starts the process from which the others are forked; its imports take seconds."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    forkserver.ensure_running()


class MediaPool:
    """Processes that decode.

    Args:
        name: of its threads.
        processes: tasks at once.
        waiting: tasks that wait for a process; one more is refused.
        seconds: of wall time that a task may take, once it has a process.
        memory: bytes that it may take.
        nice: added to the processes' niceness: they leave the processor to those with less.
    """

    def __init__(
        self, name: str, processes: int, waiting: int, seconds: float, memory: int, nice: int = 0
    ) -> None:
        self._jobs, self._most = deque[_Job](), waiting
        self._changed = threading.Condition()  # the lock of both: there is a job; it closes
        self._seconds = seconds
        self._closing = False
        self._tried = threading.Event()
        self._workers = [_Worker(memory, nice) for _ in range(processes)]
        self._threads = [
            threading.Thread(target=self._run, args=(worker,), name=name, daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def started(self) -> bool:
        """Whether a process is there, or could not be started: then a task tries again."""
        return self._tried.is_set()

    @property
    def processes(self) -> list[int]:
        """Their numbers."""
        found = [worker.pid for worker in self._workers]
        return [pid for pid in found if pid is not None]

    @property
    def waiting(self) -> int:
        """Tasks without a process."""
        return len(self._jobs)

    async def frames(
        self, task: Task, on_frame: Callable[[int], None] = lambda size: None
    ) -> list[Tensor]:
        """What a medium shows, uint8 [3, tile, tile] each; cancelling it ends the decoding.

        Raises:
            Refused: `overloaded`, `too_slow`, or what is wrong with the request.
            SampleError: the medium cannot be decoded.
        """
        job = _Job(task, self._seconds, on_frame)
        with self._changed:
            if self._closing:
                raise Refused("overloaded", _CLOSING)
            if len(self._jobs) >= self._most:
                raise Refused("overloaded", "too many media wait to be decoded")
            self._jobs.append(job)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.abandoned = True
            with self._changed, contextlib.suppress(ValueError):  # where it does not wait any more
                self._jobs.remove(job)
            raise

    def close(self) -> None:
        """Ends the processes. What waits is refused; a process that is still being started ends
        when it finds its server gone."""
        with self._changed:
            self._closing = True
            waiting = [*self._jobs]
            self._jobs.clear()
            self._changed.notify_all()
        for job in waiting:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(Refused("overloaded", _CLOSING))
        until = time.monotonic() + _LAST
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, worker: _Worker) -> None:
        try:
            worker.start()  # before the first task comes
        except Exception:
            log.exception("a process that decodes did not start: it is tried again with a task")
        self._tried.set()
        while (job := self._next()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(worker.run(job, partial(self._unwanted, job)))
            except Exception as error:
                job.future.set_exception(error)
        worker.kill()

    def _next(self) -> _Job | None:
        """The job that has waited longest; None: the pool closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            return None if self._closing else self._jobs.popleft()

    def _unwanted(self, job: _Job) -> bool:
        return job.abandoned or self._closing


class _Worker:
    """One process, started where there is none."""

    def __init__(self, memory: int, nice: int) -> None:
        self._settings = memory, nice
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def run(self, job: _Job, unwanted: Callable[[], bool]) -> list[Tensor]:
        """The frames of a task; the errors are those of MediaPool.frames."""
        try:
            return self._decode(job, unwanted)
        except (EOFError, OSError):  # the process has ended
            code = self.kill(patience=2.0)
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                raise _too_slow(job.task.cpu, "of processor time") from None
            detail = f"its decoder failed ({code})"
            raise SampleError(f"undecodable_{job.task.kind}", detail) from None

    def kill(self, patience: float = 0.0) -> int | None:
        """Ends the process; its exit code, negative for a signal. One that is about to end gets
        `patience` seconds to say why."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
        if process is None:
            return None
        process.join(patience)
        process.kill()
        process.join()
        return process.exitcode

    def start(self) -> None:
        """A new process."""
        prepare()
        context = multiprocessing.get_context("forkserver")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=work, args=(other, *self._settings), daemon=True)
        self._process.start()
        other.close()

    def _decode(self, job: _Job, unwanted: Callable[[], bool]) -> list[Tensor]:
        if self._process is None or not self._process.is_alive():
            self.kill()
            self.start()
        assert self._connection is not None
        connection, task, frames = self._connection, job.task, list[Tensor]()
        connection.send(task)
        until = time.monotonic() + job.seconds
        while True:
            if not connection.poll(_LOOK):
                if unwanted():
                    self.kill()
                    raise Refused("failed", "its client has left")
                if time.monotonic() > until:
                    self.kill()
                    raise _too_slow(job.seconds, "to decode")
                continue
            message = bytearray(connection.recv_bytes())
            if message[:1] == b"E":
                raise _error(message[1:])
            try:
                job.on_frame(len(message))
            except Refused:
                self.kill()
                raise
            frame = torch.frombuffer(message, dtype=torch.uint8, offset=1)
            frames.append(frame.view(3, task.tile, task.tile))
            if message[:1] == b"L":
                return frames


def _too_slow(seconds: float, words: str) -> Refused:
    return Refused("too_slow", f"the medium takes more than {seconds:g} s {words}")


def _error(message: bytearray) -> Exception:
    fields = json.loads(message)
    if "reason" in fields:
        return SampleError(fields["reason"], fields["detail"])
    return Refused(fields["code"], fields["message"], fields["field"])
