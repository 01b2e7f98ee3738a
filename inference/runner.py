"""Many sessions on one engine: a thread that owns the engine and batches their steps.

runner = Runner(engine)
async with runner.session(pace=None) as session:     # or: with runner.session(...)
    session.push_frame(image, at=0.0)
    session.prompt("What is it?")
    async for event in session.events():             # or: for event in session.events()
        ...
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inference.answer import Answer
from inference.engine import Engine, EngineFull, Sampling, Slot, Step
from inference.events import Event
from inference.pictures import Picture, as_picture, fit
from inference.session import Frame, Plan, Prompt, Session, SessionConfig
from inference.speech import Vocabulary
from inference.stats import Measure, Stats

log = logging.getLogger(__name__)

METRICS_EVERY = 10.0  # seconds between a session's `session.metrics`


class SessionClosed(Exception):
    """The session takes nothing any more; the message says why."""


@dataclass(eq=False)
class _Seat:
    """A session's place in the engine; its slot is opened with its first step."""

    task: Session | Answer
    slot: Slot | None = None
    closing: str = ""  # why it is to be closed
    told_at: float = 0.0


class Runner:
    """Owns an engine from its making to `close`. Every method may be called from any thread."""

    def __init__(self, engine: Engine, measured: Measure | None = None) -> None:
        self.engine, self.words = engine, Vocabulary.of(engine.tokenizer.backend_tokenizer)
        self.tile: int = engine.config.vision_config.image_size  # pixels of a frame's side
        self._measured = measured
        self._seats: list[_Seat] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._stopping = ""
        self._thread = threading.Thread(target=self._run, name="moss-engine", daemon=True)
        self._thread.start()

    def session(
        self, config: SessionConfig | None = None, *, log_limit: int = 65536, **fields: Any
    ) -> SessionHandle:
        """Opens a session; `fields` are SessionConfig's; `log_limit`: events that are kept for
        readers. EngineFull where no slot is free, SampleError for texts with control tokens.
        """
        config = config or SessionConfig(**fields)
        name = f"session{next(self._numbers)}"
        return self._seat(Session(name, config, self.words, self._stats(), log_limit))

    def answer(
        self,
        tokens: Sequence[int],
        images: Sequence[Tensor] = (),
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 1024,
        chunk: int = 8,
    ) -> SessionHandle:
        """Answers a whole question once: tokens, and uint8 [3, H, W] for each `<|image|>`."""
        name = f"answer{next(self._numbers)}"
        sampling = sampling or Sampling()
        task = Answer(
            name, tokens, images, self.words, self._stats(),
            sampling=sampling, max_new_tokens=max_new_tokens, chunk=chunk,
        )  # fmt: skip
        return self._seat(task)

    def restore(self, state: Mapping[str, Any]) -> SessionHandle:
        """The session that `SessionHandle.save` gave, to be gone on with, here or elsewhere."""
        task = Session.resume(state["session"], self.words, self._stats(), time.monotonic())
        handle = self._seat(task)
        if state["slot"] is not None:

            def put() -> None:
                handle._seat.slot = self.engine.restore(state["slot"])

            self.call(put).result()
        return handle

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._seats)

    @property
    def cached_frames(self) -> int:
        """Frames in the rings of all sessions."""
        return sum(len(seat.slot.frames) for seat in list(self._seats) if seat.slot)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs a function in the engine's thread, between two steps."""
        future: Future[Any] = Future()
        with self._changed:
            self._refuse_if_stopped()
            self._calls.append((function, future))
            self._changed.notify_all()
        return future

    def close(self, reason: str = "the runner was closed") -> None:
        """Closes all sessions, then the thread. Again: nothing happens."""
        with self._changed:
            self._stopping = self._stopping or reason
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stats(self) -> Stats:
        return Stats(self._measured)

    def _seat(self, task: Session | Answer) -> SessionHandle:
        seat = _Seat(task, told_at=time.monotonic())
        with self._changed:
            self._refuse_if_stopped()
            if len(self._seats) >= self.engine.max_sessions:
                raise EngineFull(f"all {self.engine.max_sessions} sessions are taken")
            self._seats.append(seat)
            self._changed.notify_all()
        return SessionHandle(self, seat)

    def _refuse_if_stopped(self) -> None:
        if self._stopping:
            raise SessionClosed(self._stopping)

    # The engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._close_seats()
                batch = self._wait()
                if batch:
                    self._step(batch)
        except BaseException as error:  # told to every session: nobody else would hear of it
            log.exception("the engine's thread ended")
            self._stopping = f"the engine failed: {error}"
        with self._changed:
            for seat in self._seats:
                seat.closing = seat.closing or self._stopping
            for _, future in self._calls:
                future.set_exception(SessionClosed(self._stopping))
            self._calls.clear()
        self._close_seats()

    def _wait(self) -> list[tuple[_Seat, Plan]]:
        """The next batch of steps; none where there was something else to do."""
        with self._changed:
            calls, self._calls = self._calls, []
            now = time.monotonic()
            batch = []
            for seat in self._seats:
                plan = None if seat.closing else seat.task.plan(now)
                if plan:
                    batch.append((seat, plan))
            if batch:
                self._changed.notify_all()  # frames were taken: there is room
            elif not calls and not self._leaving() and not self._stopping:
                wakes = [seat.task.wake for seat in self._seats if seat.task.wake is not None]
                self._changed.wait(max(0.0, min(wakes) - now) if wakes else None)
        for function, future in calls:
            _settle(function, future)
        return batch

    def _step(self, batch: Sequence[tuple[_Seat, Plan]]) -> None:
        try:
            images = [image for _, plan in batch for image in plan.images]
            features = iter(self.engine.encode(images) if images else [])
            steps = []
            for seat, plan in batch:
                if seat.slot is None:
                    seat.slot = self.engine.open(_sampling(seat.task))
                elif seat.slot.sampling != _sampling(seat.task):
                    self.engine.set_sampling(seat.slot, _sampling(seat.task))
                frames = list(itertools.islice(features, len(plan.images)))
                steps.append(Step(seat.slot, plan.tokens, frames, plan.sample))
            tokens = self.engine.step(steps)
        except ValueError as error:  # nothing has changed: the others of the batch may go on
            if len(batch) > 1:
                for one in batch:
                    self._step([one])
            else:
                self._fail(batch, error)
            return
        except Exception as error:
            log.exception("a step of %s failed", ", ".join(seat.task.name for seat, _ in batch))
            self._fail(batch, error)
            return
        now = time.monotonic()
        with self._changed:
            for (seat, plan), token in zip(batch, tokens, strict=True):
                seat.task.took(plan, token, now)
                self._report(seat, now)

    def _fail(self, batch: Sequence[tuple[_Seat, Plan]], error: Exception) -> None:
        with self._changed:
            for seat, _ in batch:
                seat.task.tell("error", code="engine_error", message=str(error))
                seat.closing = f"the engine failed: {error}"

    def _report(self, seat: _Seat, now: float) -> None:
        assert seat.slot is not None
        task = seat.task
        for eviction in seat.slot.evictions:
            count = len(eviction.positions)
            task.stats.count(f"evicted_{eviction.kind}", count)
            at = list(eviction.positions)
            task.tell("session.evicted", kind=eviction.kind, count=count, positions=at)
        seat.slot.evictions.clear()
        if now - seat.told_at >= METRICS_EVERY:
            seat.told_at = now
            task.tell(
                "session.metrics", cached_frames=len(seat.slot.frames), **task.stats.summary()
            )

    def _leaving(self) -> list[_Seat]:
        return [seat for seat in self._seats if seat.closing or seat.task.over]

    def _close_seats(self) -> None:
        with self._changed:
            for seat in self._leaving():
                self._seats.remove(seat)
                cached = len(seat.slot.frames) if seat.slot else 0
                if seat.slot is not None:
                    self.engine.close(seat.slot)
                task = seat.task
                task.tell("session.metrics", cached_frames=cached, **task.stats.summary())
                task.tell("session.closed", reason=seat.closing or "the input has ended")
                task.log.close()
            self._changed.notify_all()


class SessionHandle:
    """A session as its user holds it, in a thread or in an event loop."""

    def __init__(self, runner: Runner, seat: _Seat) -> None:
        self._runner, self._seat = runner, seat
        self.name, self.log = seat.task.name, seat.task.log
        self._count = 0

    @property
    def config(self) -> SessionConfig:
        return self._open()[1].config

    def push_frame(
        self, image: Picture, at: float | None = None, prompt: str | None = None
    ) -> None:
        """Gives a frame of second `at` (by default one interval after the last), and a prompt to
        be asked right before it. Never waits: a live session drops its oldest waiting frame and
        says so, another one raises QueueFull. Raises SessionClosed, and as_picture's errors.
        """
        picture = fit(as_picture(image), self._runner.tile)
        changed, task = self._open()
        with changed:
            self._refuse_if_closed()
            at = self._count * task.config.frame_interval if at is None else at
            task.push(Frame(picture, at, time.monotonic(), prompt))
            self._count += 1
            changed.notify_all()

    def put_frame(self, image: Picture, at: float | None = None, prompt: str | None = None) -> None:
        """As `push_frame`, after waiting for room in the queue."""
        changed, _ = self._open()
        with changed:
            changed.wait_for(lambda: self._room() or self.log.closed)
            self.push_frame(image, at, prompt)

    def put_prompt(self, text: str) -> None:
        """As `prompt`, but the frames that were given before it are taken in first; waits for room
        in their queue."""
        changed, task = self._open()
        with changed:
            changed.wait_for(lambda: self._room() or self.log.closed)
            self._refuse_if_closed()
            task.push(Frame(None, 0.0, time.monotonic(), text))
            changed.notify_all()

    async def aput_frame(
        self, image: Picture, at: float | None = None, prompt: str | None = None
    ) -> None:
        """As `put_frame`, in an event loop. For one task at a time."""
        seen = self.log.last_seq
        while not (self._room() or self.log.closed):
            await self.log.wait(seen)
            seen = self.log.last_seq
        self.push_frame(image, at, prompt)

    def configure(self, **changes: Any) -> None:
        """Changes fields of the session's config: see Session.configure."""
        changed, task = self._open()
        with changed:
            task.configure(**changes)

    def prompt(self, text: str) -> None:
        """Asks; what is being said stops at the next token. QueueFull, SampleError."""
        changed, task = self._open()
        with changed:
            self._refuse_if_closed()
            task.ask(Prompt(text, time.monotonic()))
            changed.notify_all()

    def cancel(self) -> bool:
        """Ends what is being said; False: nothing is."""
        changed, task = self._open()
        with changed:
            cancelled = task.cancel()
            changed.notify_all()
        return cancelled

    def drop(self, reason: str, at: float, count: int = 1) -> None:
        """Reports frames that never reached the session."""
        changed, task = self._open()
        with changed:
            task.drop(reason, at, count)

    def tell(self, type: str, **data: Any) -> None:
        """Writes an event of the caller's into the session's log."""
        with self._runner._changed:
            if not self.log.closed:
                self._seat.task.tell(type, **data)

    def end(self) -> None:
        """No more input: what is there is taken in and said, then the session closes itself."""
        changed, task = self._open()
        with changed:
            task.end()
            changed.notify_all()

    def close(self, reason: str = "closed by its owner") -> None:
        """Ends it now, at the next token boundary. Again: nothing happens."""
        with self._runner._changed:
            self._seat.closing = self._seat.closing or reason
            self._runner._changed.notify_all()

    def save(self) -> dict[str, Any]:
        """The state between two steps, for `Runner.restore`; the session goes on."""
        seat, engine = self._seat, self._runner.engine
        _, task = self._open()

        def state() -> dict[str, Any]:
            self._refuse_if_closed()
            slot = None if seat.slot is None else engine.save(seat.slot)
            with self._runner._changed:
                return {"session": task.state(), "slot": slot}

        return self._runner.call(state).result()

    def stats(self) -> dict[str, Any]:
        """Counts and durations so far: see Stats.summary."""
        with self._runner._changed:
            slot = self._seat.slot
            summary = self._seat.task.stats.summary()
        return {"cached_frames": len(slot.frames) if slot else 0, **summary}

    def events(self, after: int = 0) -> Events:
        """The events after number `after`, as they come, for `for` and for `async for`."""
        return Events(self, after)

    def __enter__(self) -> SessionHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        with self._runner._changed:
            self._runner._changed.wait_for(lambda: self.log.closed)

    async def __aenter__(self) -> SessionHandle:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        while not self.log.closed:
            await self.log.wait(self.log.last_seq)

    def _open(self) -> tuple[threading.Condition, Session]:
        task = self._seat.task
        assert isinstance(task, Session), "an answer takes no input"
        return self._runner._changed, task

    def _room(self) -> bool:
        _, task = self._open()
        return len(task.frames) < task.config.max_waiting_frames

    def _refuse_if_closed(self) -> None:
        if self._seat.closing or self.log.closed:
            raise SessionClosed(f"{self.name}: {self._seat.closing or 'its input has ended'}")


class Events:
    """A session's events, for `for` and for `async for`."""

    def __init__(self, handle: SessionHandle, after: int) -> None:
        self._handle, self._after = handle, after

    def __iter__(self) -> Iterator[Event]:
        return self._handle.log.follow(self._after)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._handle.log.afollow(self._after)


def _sampling(task: Session | Answer) -> Sampling:
    return task.config.sampling if isinstance(task, Session) else task.sampling


def _settle(function: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
