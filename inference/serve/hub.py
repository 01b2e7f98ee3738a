"""The server's sessions by id: a session lives on for a while without a socket, and is closed when
its client does not come back or gives no input."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from torch import Tensor

from data_pipeline.images import decode_image
from inference.engine.images import fit
from inference.export_info import ExportInfo
from inference.live_clock import LiveClock
from inference.serve.limits import Limits
from inference.serve.metrics import Metrics
from inference.session.handle import SessionHandle
from inference.session.runner import Runner
from inference.session.session import SessionConfig

MODEL = "moss-video"  # its name in the protocols
NORMAL, GOING_AWAY, POLICY, TRY_LATER = 1000, 1001, 1008, 1013  # WebSocket close codes
UNKNOWN, IDLE, REPLACED = 4404, 4408, 4409  # and our own


class LiveSession:
    """A session and the socket that holds it."""

    def __init__(self, handle: SessionHandle) -> None:
        # Whoever knows the id may resume the session: it cannot be guessed.
        self.id = f"sess_{secrets.token_urlsafe(16)}"
        self.handle = handle
        self.socket: object | None = None  # the one that holds it now
        self.replaced = asyncio.Event()  # set when another socket takes the session
        self.close_code = NORMAL
        self.untouched = True  # no input has come yet: the session ends with its socket
        self.last_input = self.detached_at = time.monotonic()
        self.clock = LiveClock()  # of frames that come without a second

    def attach(self, socket: object) -> asyncio.Event:
        """Gives the session to a socket; sets the event of the socket that held it."""
        self.replaced.set()
        self.socket, self.replaced = socket, asyncio.Event()
        return self.replaced

    def detach(self, socket: object) -> None:
        if self.socket is socket:
            self.socket, self.detached_at = None, time.monotonic()

    def close(self, reason: str, code: int = NORMAL) -> None:
        self.close_code = code
        self.handle.close(reason)


class Hub:
    """All sessions by id, and what the routes share."""

    def __init__(
        self, runner: Runner, limits: Limits, metrics: Metrics, export: ExportInfo
    ) -> None:
        self.runner, self.limits, self.metrics, self.export = runner, limits, metrics, export
        self.sessions: dict[str, LiveSession] = {}
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="moss-decode")
        self.closing = False
        self.waiting = 0  # chat requests without a place in the engine
        self._reaper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to close sessions whose time is over; in the event loop."""
        self._reaper = asyncio.create_task(self._reap())

    def open(self) -> LiveSession:
        """A new session; EngineFull where all are taken."""
        handle = self.runner.session(SessionConfig(), log_limit=self.limits.replay)
        live = LiveSession(handle)
        self.sessions[live.id] = live
        handle.emit("session.created", session=self.describe(live))
        return live

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
            **asdict(config.sampling),
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
        """A picture as the model sees it, made outside of the event loop; SampleError."""

        def make() -> Tensor:
            return fit(decode_image(data), self.runner.tile)

        return await asyncio.get_running_loop().run_in_executor(self.decoders, make)

    def forget(self, live: LiveSession) -> None:
        """Removes a session that nobody will resume, unless a socket holds it."""
        if live.socket is None:
            self.sessions.pop(live.id, None)

    def find(self, name: str) -> LiveSession | None:
        return self.sessions.get(name)

    async def close(self, patience: float = 5.0) -> None:
        """Closes all sessions; answers that are running get `patience` seconds."""
        self.closing = True
        if self._reaper:
            self._reaper.cancel()
        for live in self.sessions.values():
            live.close("the server is shutting down", GOING_AWAY)
        until = time.monotonic() + patience
        while self.runner.sessions and time.monotonic() < until:
            await asyncio.sleep(0.02)
        while any(live.socket for live in self.sessions.values()) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(self.runner.close, "the server is shutting down")
        self.decoders.shutdown(wait=False, cancel_futures=True)

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
