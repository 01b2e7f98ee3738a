"""A session at the front: its client's socket on one side, a replica on the other, and between them
all that it takes to go on with it on another replica.

The front passes on events only together with the record that covers them. So a replica may end at
any moment: what came after its last record has not been seen by anyone, and is computed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from inference.replicas.places import Places
from inference.replicas.replica import Replica
from inference.serve.accounts import Usage
from inference.serve.limits import Limits
from inference.serve.session_socket import (
    FAILED,
    NORMAL,
    ResumableSession,
    SessionSocket,
    settings,
    used,
)
from inference.serve.wire import pack, unpack
from inference.session.events import Event, EventLog
from inference.session.journal import Record, fold, sources
from inference.session.stats import usage_of

log = logging.getLogger(__name__)

UNTAKEN = 64  # messages of a client that no replica has taken; it waits with more
UNTAKEN_BYTES = 2**24
TRIES = 5  # replicas that may end in a row without a step of the session in between
_HEAD = ("type", "seq", "t_server", "t_media")  # of an event
_EMPTY = 0.5  # seconds for which a replica that said it was full is asked no more
_LEAVE = 1.0  # seconds in which a replica that a session leaves gives its seat back


@dataclass(eq=False)
class Message:
    """A client's message: text, or bytes."""

    number: int
    arrived: float
    text: str | None
    data: bytes | None
    over: str = ""  # a limit of its client's key that it exceeds

    @property
    def size(self) -> int:
        return len(self.text or "") + len(self.data or b"")

    def pack(self) -> bytes:
        values: dict[str, Any] = {"n": self.number, "age": time.monotonic() - self.arrived}
        values |= {"over": self.over} if self.over else {}
        if self.data is not None:
            return pack(values, [self.data])
        # Not as JSON in JSON, which may be six times as long.
        return pack({**values, "text": True}, [(self.text or "").encode()])


class Home(Protocol):
    """The front, as a session sees it."""

    limits: Limits
    places: Places

    def passed(self, session: FrontSession, type: str, data: dict[str, Any]) -> None:
        """A replica's event is on its way to the client."""

    def forget(self, session: FrontSession) -> None:
        """Nobody will resume it."""


class FrontSession(ResumableSession):
    """One session, from its first socket to its end."""

    def __init__(self, front: Home, name: str) -> None:
        super().__init__(EventLog(front.limits.replay))
        self.front, self.id = front, name
        self.replica: Replica | None = None
        self.kept: Record = {}  # all records, folded
        self.pictures: dict[int, bytes] = {}  # by the message that brought them
        self._began = time.monotonic()
        self.requested_at = 0.0
        self._recorded_at = self._lost_at = 0.0
        self._untaken: deque[Message] = deque()
        self._held_bytes = 0
        self._number = 0  # of the last message
        self._more, self._room, self._wanted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._wanted.set()
        self._end = (NORMAL, "the session is over")
        self._reason = "replica_lost"
        self._tries = 0
        self._reported_place: tuple[Any, ...] = ()
        self._cut = asyncio.Event()  # the session leaves its replica
        self._adrift = False  # it has left one, and none has gone on with it
        self._link: ClientConnection | None = None
        self.task = asyncio.create_task(self._run())

    @property
    def end(self) -> tuple[int, str]:
        return self._end

    @property
    def over(self) -> bool:
        return self.log.closed

    @property
    def started(self) -> bool:
        """A replica has had it."""
        return bool(self.kept)

    @property
    def leaving(self) -> bool:
        """Whether it is giving its place back at this moment."""
        return self._cut.is_set()

    @property
    def away(self) -> float:
        """Seconds for which it had no replica, or the replica had not yet rebuilt it."""
        return time.monotonic() - self._lost_at

    @property
    def rebuilding(self) -> bool:
        """Whether its client waits until a replica goes on with it."""
        return self._adrift and self.socket is not None and not self.over

    @property
    def untouched(self) -> bool:
        """No input has come."""
        return not self._untaken and bool(self.kept.get("connection", {}).get("untouched", True))

    @property
    def size(self) -> int:
        """Bytes of the pictures and messages that are kept."""
        return self._held_bytes + sum(map(len, self.pictures.values()))

    @property
    def _counts(self) -> dict[str, int]:
        return self.kept["session"]["counts"] if self.kept else {}

    def used(self) -> Usage:
        return used(self._counts)

    def requested(self) -> dict[str, Any]:
        return settings(self.kept["session"]["config"]) if self.kept else {}

    # The client's side

    async def put(self, text: str | None, data: bytes | None, over: str) -> None:
        """A message of the client; waits while too many are not taken."""
        while len(self._untaken) >= UNTAKEN or self._held_bytes > UNTAKEN_BYTES:
            self._room.clear()
            await self._room.wait()
        self._number += 1
        message = Message(self._number, time.monotonic(), text, data, over)
        self._untaken.append(message)
        self._held_bytes += message.size
        self._more.set()

    def wake(self) -> None:
        """Asks for a place: its client is there."""
        self._wanted.set()

    def sleep(self) -> None:
        """Gives its place to others until its client comes back."""
        self._wanted.clear()
        self.move("away")

    def move(self, reason: str) -> None:
        """Leaves its replica, and goes on elsewhere."""
        self._reason, self._adrift = reason, self.started
        self._cut.set()

    async def close(self, reason: str, code: int, patience: float = 2.0) -> None:
        """Ends the session: with the last words of its replica, where that still gives some."""
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(WebSocketException, OSError, TimeoutError):
                async with asyncio.timeout(patience):
                    await link.send(pack({"end": [code, reason]}))
                    while not self.log.closed:
                        await self.log.wait(self.log.last_seq)
        self.finish(code, reason)

    def finish(self, code: int, reason: str) -> None:
        """No more events."""
        if not self.log.closed:
            usage = usage_of(self._counts, time.monotonic() - self._began)
            self._emit("session.closed", reason=reason, usage=usage)
            self._end = (code, reason)
            self.log.close()
        self.task.cancel()

    def queued(self, position: int, estimate: float | None, reason: str) -> None:
        if self._reported_place != (position, reason):
            self._reported_place = (position, reason)
            self._emit("session.queued", position=position, estimate_s=estimate, reason=reason)

    def _emit(self, type: str, **data: Any) -> None:
        media = self.kept["session"]["flags"]["media"] if self.kept else 0.0
        self.log.append(type, media, data)

    # The replica's side

    async def _run(self) -> None:
        try:
            while not self.over:
                if self.started and self.socket is None:
                    self._wanted.clear()
                await self._wanted.wait()
                self.requested_at = self.requested_at or time.monotonic()
                self._cut.clear()  # from the moment it has a seat it may be told to leave it
                self.replica = await self.front.places.take(self)
                try:
                    await self._stay(self.replica)
                except (WebSocketException, OSError, TimeoutError) as error:
                    # It ends, and the front has not heard of it yet.
                    log.info("%s: replica %d: %s", self.id, self.replica.number, error)
                    self.replica.full_until = time.monotonic() + _EMPTY
                    await asyncio.sleep(0)
                finally:
                    self._lost_at, self._adrift = time.monotonic(), self.started
                    replica, self.replica = self.replica, None
                    self.front.places.release(self, replica)
        except Exception as error:
            log.exception("%s ended", self.id)
            self.finish(FAILED, f"the server failed: {type(error).__name__}")

    async def _stay(self, replica: Replica) -> None:
        """Runs the session on one replica, until the session or the replica ends, or the session
        leaves."""
        self._lost_at = self._lost_at or time.monotonic()
        async with replica.connection() as link:
            await self._open(link)
            self._link = link
            tasks = [
                asyncio.create_task(work)
                for work in (self._send(link), self._receive(link, replica), self._cut.wait())
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._link = None
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                await self._leave(link, replica)
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, WebSocketException | OSError):
                raise end
        if not (self._cut.is_set() or self.over):
            self._lost(replica)

    @staticmethod
    async def _leave(link: ClientConnection, replica: Replica) -> None:
        """Waits until a replica that serves has given the seat back: who gets it next would be told
        that the replica is full. Its last words are no news: the session goes on without it."""
        if replica.serves:
            with contextlib.suppress(WebSocketException, OSError, TimeoutError):
                async with asyncio.timeout(_LEAVE):
                    await link.send(pack({"end": [NORMAL, "it goes on elsewhere"]}))
                    async for _ in link:
                        pass
        link.transport.abort()

    def _lost(self, replica: Replica) -> None:
        if time.monotonic() < replica.full_until:
            return
        self._reason, self._tries = "replica_lost", self._tries + 1
        if self._tries >= TRIES:
            self.finish(FAILED, f"{TRIES} replicas in a row have ended while they had it")

    async def _open(self, link: ClientConnection) -> None:
        opening: Record = {"id": self.id, "seq": self.log.last_seq, "kept": None}
        if self.kept:
            opening |= {
                "kept": self.kept,
                "pictures": len(self.pictures),
                "age": time.monotonic() - self._recorded_at,
                "reason": self._reason,
            }
        await link.send(pack(opening))
        for number, data in list(self.pictures.items()) if self.kept else ():
            await link.send(pack({"picture": number}, [data]))

    async def _send(self, link: ClientConnection) -> None:
        sent = self.kept.get("taken", 0)
        while True:
            self._more.clear()
            for message in list(self._untaken):
                if message.number > sent:
                    await link.send(message.pack())
                    sent = message.number
            await self._more.wait()

    async def _receive(self, link: ClientConnection, replica: Replica) -> None:
        async for message in link:
            assert isinstance(message, bytes)
            values, blobs = unpack(message)
            if "record" in values:
                self._take(values, blobs)
            elif "kick" in values:
                await self._kick(*values["kick"])
            elif "close" in values:
                self._end = tuple(values["close"])
                self.log.close()
                return
            elif values["full"]:
                replica.full_until = time.monotonic() + _EMPTY
            else:
                self.finish(FAILED, values["refused"])

    async def _kick(self, code: int, reason: str) -> None:
        """Closes its client's socket; the session lives on."""
        if isinstance(self.socket, SessionSocket):
            await self.socket.close(code, reason)

    def _take(self, values: Record, blobs: list[bytes]) -> None:
        """A record, and the events that it covers."""
        record = values["record"]
        self._reported_place, self.requested_at, self._adrift = (), 0.0, False  # it has a place
        if record.get("slot", {}).get("position") != self.kept.get("slot", {}).get("position"):
            self._tries = 0
        fold(self.kept, record)
        self._recorded_at = time.monotonic()
        self.pictures.update(zip(values["pictures"], blobs, strict=True))
        needed = sources(self.kept)
        if self.pictures.keys() - needed:
            self.pictures = {n: data for n, data in self.pictures.items() if n in needed}
        while self._untaken and self._untaken[0].number <= record["taken"]:
            self._held_bytes -= self._untaken.popleft().size
            self._room.set()
        for event in values["events"]:
            type, seq, t_server, t_media = (event.pop(name) for name in _HEAD)
            self.log.put(Event(type, seq, t_server, t_media, event))
            self.front.passed(self, type, event)
