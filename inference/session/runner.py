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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from torch import Tensor

from inference.engine.engine import Engine, EngineFull
from inference.engine.lifetime import ProcessLock, close_at_exit
from inference.engine.sampling import Sampling
from inference.engine.slots import Slot
from inference.session.answer import Answer, attends_all
from inference.session.calls import Call
from inference.session.compute import compute
from inference.session.events import LOG_LIMIT
from inference.session.grammar import Grammar, GrammarError
from inference.session.handle import RunningSession, SessionClosed, SessionHandle, led_by_first
from inference.session.inputs import StepRequest
from inference.session.response import Vocabulary
from inference.session.session import Session, SessionConfig
from inference.session.session_state import resume
from inference.session.stats import Measure, Stats

log = logging.getLogger(__name__)

METRICS_EVERY = 10.0  # seconds between a session's `session.metrics`
INPUT_ENDED = "the input has ended"  # why a session is over that nothing has closed


class Runner:
    """Owns an engine from its making to `close`. Every method may be called from any thread."""

    def __init__(self, engine: Engine, measured: Measure | None = None) -> None:
        self.engine, self.vocabulary = engine, Vocabulary.of(engine.tokenizer.backend_tokenizer)
        self.tile: int = engine.config.vision_config.image_size  # pixels of a frame's side
        self.measured = measured
        self._running: list[RunningSession] = []
        self._parked: list[RunningSession] = []
        self._calls: list[Call] = []
        self._numbers = itertools.count(1)
        self.changed = ProcessLock()
        self._stopping = ""
        self.failed = ""  # why the engine's thread has ended; empty: it has not failed
        self._busy_since: float | None = None  # when what the engine does now began
        self._thread = threading.Thread(target=self._run, name="moss-engine", daemon=True)
        self._thread.start()
        close_at_exit(self)

    def session(
        self, config: SessionConfig | None = None, *, log_limit: int = LOG_LIMIT, **fields: Any
    ) -> SessionHandle:
        """Opens a session; `fields` are SessionConfig's; `log_limit`: events that are kept for
        readers. EngineFull where no slot is free, SampleError for half characters."""
        config = config or SessionConfig(**fields)
        name = f"session{next(self._numbers)}"
        most = self.engine.max_tokens // 2
        return self.start(Session(name, config, self.vocabulary, self._stats(), log_limit, most))

    def answer(
        self,
        tokens: Sequence[int],
        images: Sequence[Tensor] = (),
        *,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> SessionHandle:
        """Answers a whole question once: tokens, and uint8 [3, H, W] for each `<|image|>`.
        `options`: of Answer."""
        (answer,) = self.answers(tokens, images, [sampling or Sampling()], **options)
        return answer

    def answers(
        self,
        tokens: Sequence[int],
        images: Sequence[Tensor],
        samplings: Sequence[Sampling],
        *,
        grammar: Grammar | None = None,
        **options: Any,
    ) -> list[SessionHandle]:
        """An answer for each sampling, or EngineFull; the question is computed once. ValueError for
        a sampling that the model does not take."""
        for sampling in samplings:
            self.engine.sampler.check(sampling)
        logits = self.engine.config.text_config.vocab_size
        # More than the window is a stream, which forgets, and is taken in by pieces.
        attend_all = attends_all(self.engine) and len(images) <= self.engine.window
        tasks = [
            Answer(
                f"answer{next(self._numbers)}", tokens, images, self.vocabulary, self._stats(),
                sampling=sampling, grammar=grammar and grammar.copy(),
                shared=len(samplings) > 1, attend_all=attend_all, logits=logits, **options,
            )
            for sampling in samplings
        ]  # fmt: skip
        with self.changed:
            self._check_room(len(tasks))
            return led_by_first([self.start(task) for task in tasks])

    def restore(self, state: Mapping[str, Any]) -> SessionHandle:
        """Continues a session that `SessionHandle.save` returned, of this process or another."""
        now, most = time.monotonic(), self.engine.max_tokens // 2
        task = resume(state["session"], self.vocabulary, self._stats(), now, most)

        # Between two steps, so that no step finds the session without its slot.
        def start() -> SessionHandle:
            slot = None if state["slot"] is None else self.engine.restore(state["slot"])
            try:
                return self.start(task, slot)
            except Exception:
                if slot is not None:
                    self.engine.close(slot)
                raise

        return self.call(start).result()

    def park(self, handle: SessionHandle) -> Future[None]:
        """Gives a session's place to others. Until `unpark` it keeps its context, on the CPU, and
        its input waits. A session that is over stays as it is."""
        return self.call(partial(self._park, handle.running))

    def unpark(self, handle: SessionHandle) -> Future[None]:
        """Takes a place again, if the session has none; EngineFull."""
        return self.call(partial(self._unpark, handle.running))

    @property
    def ended(self) -> bool:
        """Whether its thread has ended: what computes, `close` does not end."""
        return not self._thread.is_alive()

    @property
    def sessions(self) -> int:
        """How many have a place. The log of one that has it no more is closed."""
        with self.changed:
            return len(self._running)

    @property
    def cached_frames(self) -> int:
        """Frames in the rings of all sessions."""
        return sum(len(running.slot.frames) for running in list(self._running) if running.slot)

    @property
    def busy(self) -> float:
        """Seconds for which the engine has been at one step; 0 where it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs a function in the engine's thread, between two steps; unless its future is cancelled
        before."""
        call = Call(function)
        with self.changed:
            self._refuse_if_stopped()
            self._calls.append(call)
            self.changed.notify_all()
        return call.future

    def close(self, reason: str = "the runner was closed", seconds: float | None = None) -> None:
        """Closes all sessions, then the thread, for which it waits, up to `seconds`. Calling it
        twice is not an error, nor is it in a copy of the process, which has no thread."""
        if self.changed.copied:
            return
        with self.changed:
            self._stopping = self._stopping or reason
            self.changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stats(self) -> Stats:
        return Stats(self.measured)

    def start(
        self, task: Session | Answer, slot: Slot | None = None, *, rebuilding: bool = False
    ) -> SessionHandle:
        """Gives a session or an answer a place; EngineFull. rebuilding: it takes no step yet."""
        running = RunningSession(task, slot, last_report=time.monotonic(), rebuilding=rebuilding)
        with self.changed:
            self._refuse_if_stopped()
            self._check_room()
            self._running.append(running)
            self.changed.notify_all()
        return SessionHandle(
            running, changed=self.changed, tile=self.tile, call=self.call, save=self.engine.save
        )

    def _check_room(self, count: int = 1) -> None:
        if len(self._running) + count > self.engine.max_sessions:
            raise EngineFull(f"all {self.engine.max_sessions} sessions are taken")

    def _refuse_if_stopped(self) -> None:
        if self._stopping:
            raise SessionClosed(self._stopping)

    # The engine's thread

    def _run(self) -> None:
        try:
            self.engine.claim()
            while not self._stopping:
                self._close_finished()
                batch = self._wait()
                if batch:
                    self._busy_since = time.monotonic()
                    self._step(batch)
                    self._busy_since = None
        except BaseException as error:  # every session emits it: no caller waits here
            log.exception("the engine's thread ended")
            self.engine.abandon()
            self._stopping = self.failed = f"the engine failed: {_words(error)}"
            self._fail([*self._running, *self._parked], error)
        self._busy_since = None
        with self.changed:
            for running in (*self._running, *self._parked):
                running.closing = running.closing or self._stopping
            for call in self._calls:
                call.refuse(SessionClosed(self._stopping))
            self._calls.clear()
        self._close_finished()

    def _park(self, running: RunningSession) -> None:
        if running not in self._running or running.closing:
            return
        if running.slot is not None:
            running.parked = self.engine.save(running.slot)
            self._release(running.slot)
            running.slot = None
        with self.changed:
            self._running.remove(running)
            self._parked.append(running)

    def _unpark(self, running: RunningSession) -> None:
        if running not in self._parked:
            return
        with self.changed:
            self._check_room()
            self._parked.remove(running)
            self._running.append(running)
        try:
            if running.parked is not None:
                running.slot, running.parked = self.engine.restore(running.parked), None
        except Exception as error:  # it must not go on without its context
            self._fail([running], error)
            raise

    def _wait(self) -> list[tuple[RunningSession, StepRequest]]:
        """Runs `call`s, then waits for work: the next steps, one of each session that has one."""
        with self.changed:
            calls, self._calls = self._calls, []
        # Before the steps are planned: a planned step is in no queue any more, and not yet in the
        # engine, so that a session which is saved then would have lost it.
        for call in calls:
            call.run()
        with self.changed:
            now = time.monotonic()
            batch = []
            for running in self._running:
                try:
                    request = None if running.held else running.task.next_step(now)
                except Exception as error:  # of this session alone
                    self._fail([running], error)
                    continue
                if request:
                    running.in_step = True
                    batch.append((running, request))
            self.changed.notify_all()  # frames were taken: there is room; or all is settled
            if not (batch or self._calls or self._finished() or self._stopping):
                wakes = [r.task.wake for r in self._running if r.task.wake is not None]
                self.changed.wait(max(0.0, min(wakes) - now) if wakes else None)
        return batch

    def _step(self, batch: Sequence[tuple[RunningSession, StepRequest]]) -> None:
        """One step of the engine. Where it fails, each session's is tried alone, the oldest first:
        that which fails again ends its session; where memory is short, the newest bear it."""
        try:
            tokens = compute(self.engine, batch)
        except Exception as error:
            if not (isinstance(error, ValueError) or self.engine.recovers()):
                raise
            if len(batch) > 1:
                log.warning("a step of %d sessions failed: %s", len(batch), _words(error))
                self.engine.free_memory()
                for one in batch:
                    self._step([one])
            else:
                self._fail([batch[0][0]], error)
            return
        now = time.monotonic()
        with self.changed:
            for (running, request), token in zip(batch, tokens, strict=True):
                try:
                    running.task.stats.count("input_tokens", len(request.tokens))
                    running.task.on_token(request, token, now)
                    self._report(running, now)
                    running.stepped(request)
                    running.share(self._running, self.engine)
                except Exception as error:  # of this session alone
                    self._fail([running], error)

    def _fail(self, sessions: Sequence[RunningSession], error: BaseException) -> None:
        """Ends sessions that cannot go on."""
        with self.changed:
            for running in sessions:
                task, words = running.task, _words(error)
                code = "grammar" if isinstance(error, GrammarError) else "engine_error"
                log.error("%s ended: %s", task.name, words, exc_info=error)
                running.closing, running.failed = f"the engine failed: {words}", True
                running.in_step = False
                _attempt(partial(task.emit, "error", code=code, message=words))
                _attempt(partial(task.close, "failed", "engine_error"))

    def _report(self, running: RunningSession, now: float) -> None:
        assert running.slot is not None
        task = running.task
        for eviction in running.slot.evictions:
            at = list(eviction.positions)
            task.stats.count(f"evicted_{eviction.kind}", len(at))
            task.emit("session.evicted", kind=eviction.kind, count=len(at), positions=at)
        running.slot.evictions.clear()
        if now - running.last_report >= METRICS_EVERY:
            running.last_report = now
            task.emit("session.usage", **task.stats.usage())
            _emit_metrics(task, len(running.slot.frames))

    def _finished(self) -> list[RunningSession]:
        sessions = [r for r in (*self._running, *self._parked) if not r.rebuilding]
        return [running for running in sessions if running.closing or running.task.over]

    def _close_finished(self) -> None:
        with self.changed:
            for running in self._finished():
                (self._running if running in self._running else self._parked).remove(running)
                cached = len(running.slot.frames) if running.slot else 0
                self._release(running.slot)
                task, reason = running.task, running.closing or INPUT_ENDED
                _attempt(partial(task.close, "cancelled", "session_closed"))
                _attempt(partial(_emit_metrics, task, cached))
                usage = task.stats.usage()
                _attempt(partial(task.emit, "session.closed", reason=reason, usage=usage))
                task.log.close()
                _attempt(running.write)
            self.changed.notify_all()

    def _release(self, slot: Slot | None) -> None:
        try:
            if slot is not None:
                self.engine.close(slot)
        except Exception:  # another rank has gone; readers wait for the session's last event
            log.exception("the engine did not give back slot %d", slot.index if slot else -1)


def _emit_metrics(task: Session | Answer, cached: int) -> None:
    task.emit("session.metrics", cached_frames=cached, **task.stats.summary())


def _words(error: BaseException) -> str:
    """What an error says, or what kind it is; its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _attempt(function: Callable[[], object]) -> None:
    """A part of ending a session: where it fails, the rest is done all the same."""
    try:
        function()
    except Exception:
        log.exception("a session did not end as it should")
