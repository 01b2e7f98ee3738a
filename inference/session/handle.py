"""What a user of a session holds: its methods, for any thread and for event loops."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inference.engine.engine import Engine
from inference.engine.fork import fork
from inference.engine.images import Picture, as_picture, fit
from inference.engine.lifetime import ProcessLock
from inference.engine.slots import Slot
from inference.session.answer import Answer
from inference.session.events import Event, EventLog
from inference.session.inputs import Frame, Prompt, StepRequest
from inference.session.journal import Journal, Record
from inference.session.session import Session, SessionConfig
from inference.session.session_state import state_of


class SessionClosed(Exception):
    """The session takes no more input; the message says why."""


@dataclass(eq=False)
class RunningSession:
    """A session or an answer that a Runner runs; its slot is opened with its first step."""

    task: Session | Answer
    slot: Slot | None = None
    closing: str = ""  # why it is to be closed; empty: it is not
    failed: bool = False  # it is closed because something is broken
    parked: dict[str, Any] | None = None  # its slot, saved, while it has no place in the engine
    last_report: float = 0.0
    in_step: bool = False  # what a step has taken of its queues is nowhere else
    rebuilding: bool = False  # its slot is not whole yet: it takes no step
    journal: Journal | None = None
    leader: RunningSession | None = None  # another answer to its question, which takes it in first

    @property
    def held(self) -> bool:
        """Whether it takes no step now."""
        if self.leader is not None and (self.leader.closing or self.leader.task.over):
            self.leader = None  # it takes the question in itself
        return bool(self.closing or self.rebuilding or self.leader)

    def stepped(self, request: StepRequest) -> None:
        """Writes to the journal what a step has changed. RuntimeError where the session cannot go
        on: instead of words it would say the vocabulary's first token again and again."""
        self.in_step = False
        if self.slot is not None and self.slot.broken:
            raise RuntimeError("its logits are NaN: weights or pixels are not all numbers")
        if self.journal is not None and request.frame is not None and self.slot is not None:
            self.journal.add_frame(self.slot.position - 1, request.frame.source)
        self.write()

    def share(self, sessions: Sequence[RunningSession], engine: Engine) -> None:
        """After a step, gives the answers that wait for this one's question copies of its slot,
        once the question was taken in."""
        if isinstance(self.task, Answer) and self.task.is_prefilled and self.slot is not None:
            for other in sessions:
                if other.leader is self and isinstance(other.task, Answer) and not other.closing:
                    other.slot = engine.on_all(fork, self.slot, other.task.sampling)
                    other.task.take_over(self.task)
                    other.leader = None

    def close(self, changed: ProcessLock, reason: str) -> None:
        """Ends it at the next token boundary; in a copy of the process it does not go on anyway.
        changed: as of SessionHandle."""
        if changed.copied:
            return
        with changed:
            self.closing = self.closing or reason
            changed.notify_all()

    def write(self) -> None:
        """Writes what has changed to the journal, if there is one; what a step has begun is written
        when it is done."""
        if self.journal is not None and not self.in_step:
            assert isinstance(self.task, Session)
            self.journal.write(self.task, self.slot)


class SessionHandle:
    """A session of a Runner. Its methods may be called from any thread, and in an event loop.

    Args:
        changed: the lock of all sessions, notified when one of them has changed.
        tile: pixels of a frame's side.
        call: runs a function in the engine's thread, between two steps.
        save: the engine's `save`.
    """

    def __init__(
        self,
        running: RunningSession,
        *,
        changed: ProcessLock,
        tile: int,
        call: Callable[[Callable[[], Any]], Future[Any]],
        save: Callable[[Slot], dict[str, Any]],
    ) -> None:
        self._running, self._changed, self._tile = running, changed, tile
        self._call, self._save = call, save
        self.name, self.log = running.task.name, running.task.log
        self.model: object = None  # in which it runs; not forgotten before the session is

    @property
    def running(self) -> RunningSession:
        """What the Runner runs."""
        return self._running

    @property
    def failed(self) -> bool:
        """Whether it was closed because something is broken, not because it was over."""
        return self._running.failed

    @property
    def reason(self) -> str:
        """Why it was closed; empty: its input has ended, or it is open."""
        return self._running.closing

    @property
    def input_ended(self) -> bool:
        """No more input comes."""
        return self._open()[1].input_ended

    @property
    def config(self) -> SessionConfig:
        return self._open()[1].config

    def push_frame(
        self, image: Picture, at: float | None = None, prompt: str | None = None, source: int = 0
    ) -> float:
        """Gives a frame of second `at` (by default one interval after the last), and a prompt that
        is asked right before it; returns its second. Does not wait: if the queue is full, a live
        session drops its oldest waiting frame (`input_frame.dropped`), another session raises
        QueueFull. Raises SessionClosed, and as_picture's errors. source: its number for the
        journal.
        """
        picture = self._picture(image, prompt)
        with self._changed:
            return self._push(picture, at, prompt, source)

    def put_frame(self, image: Picture, at: float | None = None, prompt: str | None = None) -> None:
        """As `push_frame`, after waiting for room in the queue."""
        picture = self._picture(image, prompt)
        with self._changed:
            self._changed.wait_for(lambda: self._room() or self.log.closed)
            self._push(picture, at, prompt)

    def _picture(self, image: Picture, prompt: str | None) -> Tensor:
        """A frame as the model sees it, its prompt checked. It takes time (a 4K frame 50 ms), so it
        is done before the lock is taken, for which the engine and all other sessions wait."""
        picture = fit(as_picture(image), self._tile)
        self.check(prompt or "")
        return picture

    def _push(
        self, picture: Tensor, at: float | None, prompt: str | None, source: int = 0
    ) -> float:
        """`push_frame` of a picture as the model sees it, under the lock."""
        changed, task = self._open()
        self._refuse_if_closed()
        at = task.next_second if at is None else at
        task.push(Frame(picture, at, time.monotonic(), prompt, source))
        if self._running.journal is not None:
            self._running.journal.add_picture(source, picture)
        changed.notify_all()
        return at

    def put_prompt(self, text: str) -> None:
        """As `prompt`, but frames that were given before it are taken in first; waits for room in
        their queue."""
        changed, task = self._open()
        self.check(text)
        with changed:
            changed.wait_for(lambda: self._room() or self.log.closed)
            self._refuse_if_closed()
            task.push(Frame(None, 0.0, time.monotonic(), text))
            changed.notify_all()

    def settle(self) -> None:
        """Waits until the session has nothing to do without new input: all that it was given is
        taken in, and it is silent, or has said what the pace allows. On the media clock. Returns
        where it is closed, too."""
        changed, task = self._open()
        with changed:
            changed.wait_for(
                lambda: self.log.closed or (task.settled and not self._running.in_step)
            )

    async def aput_frame(
        self, image: Picture, at: float | None = None, prompt: str | None = None
    ) -> None:
        """As `put_frame`, in an event loop; to be awaited by one task at a time."""
        await self.room()
        self.push_frame(image, at, prompt)

    async def room(self) -> None:
        """Waits for room in the queue of frames, or the end."""
        last_seq = self.log.last_seq
        while not (self._room() or self.log.closed):
            await self.log.wait(last_seq)
            last_seq = self.log.last_seq

    def keep(self, journal: Journal) -> None:
        """Has all changes from now on written into `journal`."""
        with self._changed:
            self._running.journal = journal
            self._running.write()

    def read_journal(self) -> tuple[Record, dict[int, Tensor]] | None:
        """What the journal has that was not read yet."""
        with self._changed:
            journal = self._running.journal
            return None if journal is None else journal.read()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Several changes that are one for the engine, and for the journal."""
        with self._changed:
            yield
            self._running.write()

    def check(self, *texts: str) -> None:
        """Checks texts that are to be given to the session; raises PromptTooLong, SampleError. It
        takes time, so it is done here, and not in a change, for which others wait."""
        self._open()[1].check_texts(*texts)

    def configure(self, **changes: Any) -> None:
        """Changes fields of the session's config: see Session.configure."""
        changed, task = self._open()
        self.check(changes.get("system_prompt", ""), changes.get("prompt", ""))
        with changed:
            task.configure(**changes)
            changed.notify_all()  # another pace may allow the next token now

    def prompt(self, text: str) -> None:
        """Asks. A response that is being said ends at the next token. QueueFull, SampleError."""
        changed, task = self._open()
        self.check(text)
        with changed:
            self._refuse_if_closed()
            task.ask(Prompt(text, time.monotonic()))
            changed.notify_all()

    def cancel(self, name: str | None = None) -> bool:
        """Ends the response that is being said, or only the one of this name; False if it is
        not."""
        changed, task = self._open()
        with changed:
            current = task.response is not None and name in (None, task.response.name)
            cancelled = current and task.cancel()
            changed.notify_all()
        return cancelled

    def drop(self, reason: str, at: float, count: int = 1) -> None:
        """Reports frames that never reached the session."""
        changed, task = self._open()
        with changed:
            task.drop(reason, at, count)

    def emit(self, type: str, **data: Any) -> None:
        """Writes an event into the session's log."""
        with self._changed:
            if not self.log.closed:
                self._running.task.emit(type, **data)

    def end(self) -> None:
        """Ends the input: the session closes itself when all of it is taken in and answered."""
        changed, task = self._open()
        with changed:
            task.end()
            changed.notify_all()

    def close(self, reason: str = "closed by its owner") -> None:
        """Closes the session at the next token boundary. Closing it twice is not an error."""
        self._running.close(self._changed, reason)

    def save(self) -> dict[str, Any]:
        """The state between two steps, for `Runner.restore`. The session continues."""
        running = self._running
        _, task = self._open()

        def state() -> dict[str, Any]:
            self._refuse_if_closed()
            slot = running.parked if running.slot is None else self._save(running.slot)
            with self._changed:
                return {"session": state_of(task), "slot": slot}

        return self._call(state).result()

    def stats(self) -> dict[str, Any]:
        """Counts and durations so far: see Stats.summary."""
        with self._changed:
            slot = self._running.slot
            summary = self._running.task.stats.summary()
        return {"cached_frames": len(slot.frames) if slot else 0, **summary}

    def events(self, after: int = 0) -> Events:
        """The events after number `after`, as they come, for `for` and for `async for`."""
        return Events(self, after)

    def __enter__(self) -> SessionHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._changed.copied:
            return
        with self._changed:
            self._changed.wait_for(lambda: self.log.closed)

    async def __aenter__(self) -> SessionHandle:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        while not (self.log.closed or self._changed.copied):
            await self.log.wait(self.log.last_seq)

    def check_process(self) -> None:
        """RuntimeError in a copy of the process, in which the session does not go on."""
        self._changed.check()

    def _open(self) -> tuple[ProcessLock, Session]:
        task = self._running.task
        assert isinstance(task, Session), "an answer takes no input"
        return self._changed, task

    def _room(self) -> bool:
        _, task = self._open()
        return len(task.frames) < task.config.max_waiting_frames

    def _refuse_if_closed(self) -> None:
        if self._running.closing or self.log.closed:
            raise SessionClosed(f"{self.name}: {self._running.closing or 'its input has ended'}")


def led_by_first(answers: list[SessionHandle]) -> list[SessionHandle]:
    """Lets the first of several answers to one question take it in for all."""
    for other in answers[1:]:
        other.running.leader = answers[0].running
    return answers


class Events:
    """A session's events, for `for` and for `async for`."""

    def __init__(self, handle: SessionHandle, after: int) -> None:
        self._handle, self._after = handle, after

    def __iter__(self) -> Iterator[Event]:
        return self._log().follow(self._after, self._handle)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._log().afollow(self._after, self._handle)

    def _log(self) -> EventLog:
        self._handle.check_process()
        return self._handle.log
