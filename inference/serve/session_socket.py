"""A session that clients may come back to, and the socket that reads and writes it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from inference.serve.accounts import Account, Usage, Visit
from inference.serve.gate import Gate
from inference.serve.limits import Bucket, Limits
from inference.serve.realtime_events import as_message, as_messages
from inference.session.events import Event, EventLog

NORMAL, GOING_AWAY, POLICY, TRY_LATER = 1000, 1001, 1008, 1013  # WebSocket close codes
FAILED = 1011
UNKNOWN, IDLE, REPLACED = 4404, 4408, 4409  # and our own
UNKNOWN_SESSION = "no such session, or it was closed"
_TEXTS = 8  # texts a second that a socket may send beside those of frames; with more it waits


class ResumableSession:
    """A session and the socket that holds it."""

    id: str

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.socket: object | None = None  # the one that holds it now
        self.replaced = asyncio.Event()  # set when another socket takes the session
        self.detached_at = time.monotonic()
        self.visit: Visit | None = None

    def begin(self, visit: Visit) -> None:
        """Makes the session the visit's, from now to the end of its log."""
        self.visit, visit.id, visit.reads = visit, self.id, self.used

        def over() -> None:
            visit.requested = self.requested()
            visit.end(self.end[0])

        visit.follow(self.log, visit.at)
        self.log.when_closed(over)

    def belongs_to(self, account: Account) -> bool:
        """Whether an account may come back to it."""
        return self.visit is not None and self.visit.account is account

    def used(self) -> Usage:
        """The session's usage so far."""
        raise NotImplementedError

    def requested(self) -> dict[str, Any]:
        """The session's configuration, without its texts."""
        raise NotImplementedError

    @property
    def end(self) -> tuple[int, str]:
        """The close code and reason, once the log has been closed."""
        raise NotImplementedError

    def attach(self, socket: object) -> asyncio.Event:
        """Gives the session to a socket; sets the event of the socket that held it."""
        self.replaced.set()
        self.socket, self.replaced = socket, asyncio.Event()
        return self.replaced

    def detach(self, socket: object) -> None:
        if self.socket is socket:
            self.socket, self.detached_at = None, time.monotonic()


class SessionSocket:
    """A socket that holds a session, until the socket closes or the session ends."""

    def __init__(
        self, session: ResumableSession, socket: WebSocket, last_seq: int, limits: Limits
    ) -> None:
        self._held, self._socket, self._seq, self.limits = session, socket, last_seq, limits
        self._of_openai = "model" in socket.query_params  # as its clients open a session
        self._done = False  # the session's end was sent, or the client asked for it
        self._gate = Gate(session.visit.account if session.visit else None)
        self._over = ""  # which limit the message exceeds that is handled; empty: none
        rate = 2 * limits.fps + _TEXTS  # two texts may belong to a frame
        self._texts = Bucket(rate, 4 * rate)

    async def run(self) -> None:
        """Serves the socket until it closes; the session may live on."""
        replaced = self._held.attach(self)
        tasks = [asyncio.create_task(work) for work in (self._read(), self._write())]
        replacement = asyncio.create_task(replaced.wait())
        try:
            await asyncio.wait([*tasks, replacement], return_when=asyncio.FIRST_COMPLETED)
            if replacement.done() and not any(task.done() for task in tasks):
                await self.close(REPLACED, "another connection has taken the session")
        finally:
            for task in (*tasks, replacement):
                task.cancel()
            await asyncio.gather(*tasks, replacement, return_exceptions=True)
            self._held.detach(self)
            self._left()

    def _left(self) -> None:
        """Called when the socket has closed."""

    def _slow(self) -> None:
        """Called when the client does not read."""

    async def _take(self, text: str | None, data: bytes | None) -> bool:
        """Handles a message; False: it was the last one."""
        raise NotImplementedError

    async def _write(self) -> None:
        """Sends events until the log ends. Gives up a client that does not read."""
        try:
            async for event in self._held.log.afollow(self._seq):
                for text in written(event, self._of_openai):
                    await asyncio.wait_for(self._socket.send_text(text), self.limits.send)
        except TimeoutError:
            self._slow()
            return  # a close message would not get through either
        self._done = True
        await self.close(*self._held.end)

    async def _read(self) -> None:
        try:
            while True:
                message: Any = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                text, data = message.get("text"), message.get("bytes")
                # What has come already is read without a pause in which others are served.
                await asyncio.sleep(0)
                while text is not None and not self._texts.take(time.monotonic()):
                    await asyncio.sleep(0.05)
                self._over = await self._gate.over(text, data)
                if not await self._take(text, data):
                    return
        except (WebSocketDisconnect, RuntimeError):  # starlette raises it for a closed socket
            return

    async def close(self, code: int, reason: str) -> None:
        """Closes the socket."""
        try:
            await asyncio.wait_for(self._socket.close(code, cut(reason)), 1.0)
        except (RuntimeError, TimeoutError, WebSocketDisconnect):
            return  # it is closed already, or its client does not read


def written(event: Event, of_openai: bool) -> list[str]:
    """An event's messages as they are sent to a client of OpenAI's API, or to one of ours."""
    messages = as_messages(event) if of_openai else [as_message(event)]
    return [json.dumps(message, ensure_ascii=False) for message in messages]


def refusal_to_resume(session: ResumableSession | None, account: Account, last_seq: int) -> str:
    """Why a client may not come back to a session; empty: it may. last_seq: of the last event that
    it has seen."""
    if session is None or not session.belongs_to(account):
        return UNKNOWN_SESSION
    last = session.log.last_seq
    if last_seq > last:
        return f"last_seq {last_seq}: the last event of the session is {last}"
    return ""


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a session's config that may be logged."""
    names = ("pace", "frame_interval", "max_new_tokens")
    source = "live" if config["live"] else "file"
    return {"source": source, **{name: config[name] for name in names}}


def used(counts: Mapping[str, int]) -> Usage:
    """The usage in a session's counts."""
    return Usage(counts.get("frames", 0), counts.get("input_tokens", 0), counts.get("tokens", 0))


def cut(reason: str) -> str:
    """A reason's first 123 bytes, which a close frame can hold."""
    return reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")
