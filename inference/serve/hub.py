"""The server's sessions by id: a session lives on for a while without a socket, and is closed when
its client does not come back or gives no input."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from inference.engine.engine import EngineFull
from inference.export_info import ExportInfo
from inference.live_clock import LiveClock
from inference.serve.accounts import Usage
from inference.serve.decoding import Task
from inference.serve.limits import Budget, Limits
from inference.serve.media import MediaPool
from inference.serve.media_files import NO_FOLDERS, MediaFolders
from inference.serve.memory import Ceiling, SessionMemory, parked_size
from inference.serve.messages import Session
from inference.serve.metrics import Metrics
from inference.serve.session_socket import (
    FAILED,
    GOING_AWAY,
    IDLE,
    NORMAL,
    ResumableSession,
    settings,
    used,
)
from inference.session.events import EventLog
from inference.session.grammar import Grammars
from inference.session.handle import SessionClosed, SessionHandle
from inference.session.rebuilder import Rebuilder
from inference.session.runner import Runner
from inference.session.session import SessionConfig

log = logging.getLogger(__name__)

MODEL = "moss-video"  # its name in the protocols


def new_id() -> str:
    """A session's new id. Whoever knows it may resume the session, so it cannot be guessed."""
    return f"sess_{secrets.token_urlsafe(16)}"


class LiveSession(ResumableSession):
    """A session of the engine."""

    def __init__(self, handle: SessionHandle, name: str = "") -> None:
        super().__init__(handle.log)
        self.id = name or new_id()
        self.handle = handle
        self.close_code = NORMAL
        self.parked = False  # others have its place in the engine
        self.untouched = True  # no input has come yet: the session ends with its socket
        self.last_input = time.monotonic()
        self.newest = 0.0  # second of the last frame
        self.clock = LiveClock()  # of frames that come without a second

    @property
    def end(self) -> tuple[int, str]:
        code = FAILED if self.handle.failed else self.close_code
        return code, self.handle.reason or "the session is over"

    def used(self) -> Usage:
        return used(self.handle.running.task.stats.counts)

    def requested(self) -> dict[str, Any]:
        return settings(vars(self.handle.config))

    async def closed(self) -> None:
        """Waits for its end."""
        while not self.log.closed:
            await self.log.wait(self.log.last_seq)

    def close(self, reason: str, code: int = NORMAL) -> None:
        self.close_code = code
        self.handle.close(reason)


class Hub:
    """All sessions by id, and what the routes share."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        metrics: Metrics,
        export: ExportInfo,
        folders: MediaFolders = NO_FOLDERS,
    ) -> None:
        """folders: whose files chat requests may name."""
        self.runner, self.limits, self.metrics, self.export = runner, limits, metrics, export
        self.folders = folders
        self.sessions: dict[str, LiveSession] = {}
        # Frames of sessions, and the model's steps, never wait behind the clips of chat requests.
        self.pictures, self.clips = (
            MediaPool(name, limits.decoders, limits.media, seconds, limits.memory, nice)
            for name, seconds, nice in (
                ("moss-picture", limits.picture_wall, 0),
                ("moss-clip", limits.clip_wall, 10),
            )
        )
        self.rebuilder = Rebuilder(runner)
        self.rebuilding = ThreadPoolExecutor(runner.engine.max_sessions, "moss-rebuild")
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="moss-read")  # of chat requests
        # A schema may take seconds, in which the requests of others are read.
        self.schemas = ThreadPoolExecutor(1, thread_name_prefix="moss-schema")
        self.budget = Budget(limits.held)
        self.each = SessionMemory.of(runner.engine, runner.tile)
        self.memory = Ceiling(limits.sessions_memory)
        logits = runner.engine.config.text_config.vocab_size
        self.grammars = Grammars(runner.vocabulary, logits)
        self.closing = False
        self.waiting = 0  # chat requests without a place in the engine
        self._reaper: asyncio.Task[None] | None = None

    @property
    def failed(self) -> str:
        """Why the engine has ended; empty: it has not."""
        return self.runner.failed

    @property
    def status(self) -> str:
        """`ok`, `closing`, `failed` (the engine has ended), or `stuck` (a step takes too long)."""
        if self.runner.failed:
            return "failed"
        if self.closing:
            return "closing"
        return "stuck" if self.runner.busy > self.limits.step else "ok"

    @property
    def decodes(self) -> bool:
        """Whether the processes that decode have been started: the first one's imports take
        seconds, in which pings of clients that have sent a picture would not be read."""
        return self.pictures.started and self.clips.started

    def start(self) -> None:
        """Begins to close sessions whose time is over; in the event loop."""
        self._reaper = asyncio.create_task(self._reap())

    async def open(self, name: str = "", seq: int = 0) -> LiveSession:
        """A new session; EngineFull where all places, or all memory, are taken by clients that are
        there. name: its id; seq: the number before that of its first event."""
        while True:
            try:
                self.memory.check(self.each.total)
                handle = self.runner.session(SessionConfig(), log_limit=self.limits.replay)
                break
            except EngineFull:
                if not await self.make_room(self.each.total):
                    raise
        handle.log.last_seq = seq
        live = LiveSession(handle, name)
        self.hold(handle.log, self.each.total)
        self.sessions[live.id] = live
        handle.emit("session.created", session=self.describe(live))
        return live

    async def revive(self, live: LiveSession) -> None:
        """A session whose client has come back gets a place again; EngineFull. Where it cannot go
        on there, it is over, and its client hears of it."""
        while live.parked and not live.log.closed:
            try:
                with self.memory.promised(self.each.total, live.log):
                    await asyncio.wrap_future(self.runner.unpark(live.handle))
                live.parked = False
                if not live.log.closed:  # else it has given all back
                    self.memory.take(live.log, self.each.total)
            except EngineFull:
                if not await self.make_room(self.each.total):
                    raise
            except SessionClosed:
                raise
            except Exception:
                log.exception("%s ends: it has not got its context back", live.handle.name)
                live.close("its context could not be given back to it", FAILED)
                return await live.closed()

    def hold(self, log: EventLog, size: int) -> None:
        """Counts the memory of a session or an answer until its end."""
        self.memory.take(log, size)
        log.when_closed(partial(self.memory.give_back, log))

    async def make_room(self, size: int) -> bool:
        """Takes the place of the session whose client has been away longest; False: there is none.
        The session waits for its client all the same, but no more than `parked` of them do, and as
        long as the memory of so many bytes is not needed."""
        away = [
            live
            for live in self.sessions.values()
            if live.socket is None and not (live.handle.reason or live.handle.log.closed)
        ]
        away.sort(key=lambda live: live.detached_at)
        parked = [live for live in away if live.parked]
        holding = [live for live in away if not live.parked]
        short = bool(self.memory.lacks(size))
        if parked and (len(parked) >= self.limits.parked or (short and not holding)):
            parked[0].close("others needed its place")
            self.memory.give_back(parked[0].log)
            self.forget(parked[0])
            if not holding:
                return True
        if not holding:
            return False
        holding[0].parked = True
        # To its end also where who needs the place has left in between.
        await asyncio.shield(asyncio.create_task(self._park(holding[0])))
        return True

    async def _park(self, live: LiveSession) -> None:
        try:
            await asyncio.wrap_future(self.runner.park(live.handle))
        except Exception:  # who needs the place has nothing to do with it
            log.exception("%s ends: its context could not be kept", live.handle.name)
            live.parked = False
            live.close("its context could not be kept while its client was away", FAILED)
            return await live.closed()
        if not live.log.closed:
            kept = parked_size(live.handle.running.parked) + self.each.pixels
            self.memory.take(live.log, min(kept, self.each.total))

    def describe(self, live: LiveSession) -> dict[str, object]:
        """`session` of `session.created` and `session.updated`."""
        config, limits = live.handle.config, self.limits
        return {
            "id": live.id,
            "model": MODEL,
            "instructions": config.system_prompt,
            "prompt": config.prompt,
            "source": "live" if config.live else "file",
            "pace": config.pace,
            "frame_interval": config.frame_interval,
            "max_output_tokens": config.max_new_tokens,
            **{n: v for n, v in asdict(config.sampling).items() if n in Session.model_fields},
            "limits": {
                "frame_bytes": limits.frame_bytes,
                "pixels": limits.pixels,
                "prompt_chars": limits.prompt_chars,
                "fps": limits.fps,
                "grace_seconds": limits.grace,
                "idle_seconds": limits.idle,
            },
        }

    async def decode(self, data: bytes) -> Tensor:
        """A session's picture as the model sees it, made in another process.

        Raises SampleError, and Refused for what exceeds the limits.
        """
        limits = self.limits
        task = Task(
            "image", data, "image", self.runner.tile, limits.frame_bytes, limits.pixels,
            limits.picture_cpu,
        )  # fmt: skip
        (picture,) = await self.pictures.frames(task)
        return picture

    def page(self) -> bytes:
        """/metrics of what runs here."""
        return self.metrics.page(self.runner, self.each, self.memory)

    def forget(self, live: LiveSession) -> None:
        """Removes a session that nobody will resume, unless a socket holds it."""
        if live.socket is None and self.sessions.get(live.id) is live:
            del self.sessions[live.id]

    def find(self, name: str) -> LiveSession | None:
        return self.sessions.get(name)

    async def close(self, patience: float = 5.0) -> None:
        """Closes all sessions; answers that are running get `patience` seconds, and then sockets as
        many to send the end of theirs. A step of the engine that takes more than `step` seconds is
        not waited for: nothing can end it."""
        self.closing = True
        if self._reaper:
            self._reaper.cancel()
        for live in self.sessions.values():
            live.close("the server is shutting down", GOING_AWAY)
        until = time.monotonic() + patience
        while self.runner.sessions and time.monotonic() < until:
            await asyncio.sleep(0.02)
        # Sockets are waited for after it: a step may take longer than `patience`.
        seconds = self.limits.step
        await asyncio.to_thread(self.runner.close, "the server is shutting down", seconds)
        until = time.monotonic() + patience
        while any(live.socket for live in self.sessions.values()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.close_decoders()

    def close_decoders(self) -> None:
        """Ends the processes that decode media."""
        for threads in (self.readers, self.schemas, self.rebuilding):
            threads.shutdown(wait=False, cancel_futures=True)
        for pool in (self.pictures, self.clips):
            pool.close()

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.limits.grace / 4, self.limits.idle / 4))
            now = time.monotonic()
            for live in list(self.sessions.values()):
                with contextlib.suppress(Exception):  # one session must not stop the loop
                    self._close_if_late(live, now)

    def _close_if_late(self, live: LiveSession, now: float) -> None:
        limits = self.limits
        if live.socket is None and now - live.detached_at > limits.grace:
            live.close(f"nobody came back within {limits.grace:g} s")
            self.forget(live)
        elif live.socket is not None and live.handle.log.closed:
            return  # its socket is about to send the end
        elif now - live.last_input > limits.idle:
            live.close(f"idle for {limits.idle:g} s", IDLE)
