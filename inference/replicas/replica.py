"""A replica as the front sees it: where it is, whether it serves, how many seats are free."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import httpx
from websockets.asyncio.client import ClientConnection, connect, unix_connect

from inference.serve.wire import ROUTE

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "dead"]
_CONNECT = 5.0  # seconds for a connection
_PING_TIMEOUT = 5.0  # seconds: a machine that is off does not answer a ping


class Tenant(Protocol):
    """A session that has a seat, or waits for one. requested_at: since when (monotonic seconds)."""

    requested_at: float

    @property
    def started(self) -> bool:
        """Whether a replica has had it; else it is new."""

    def queued(self, position: int, estimate: float | None, reason: str) -> None:
        """Reports the session's position in the queue, from 1, and in how many seconds it is
        expected to have a seat; None: that is not known."""

    def move(self, reason: str) -> None:
        """Has the session leave its replica, and go on elsewhere."""


class Replica:
    """One process that serves the model.

    Args:
        number: of it, from 0.
        address: `unix:PATH`, or `http://HOST:PORT`.
        key: of the front, for its route.
    """

    def __init__(self, number: int, address: str, key: str) -> None:
        self.number, self.address = number, address
        self.authorization = {"Authorization": f"Bearer {key}"}
        self.state: State = "starting"
        self.served = False  # it has been ready since its process was started
        self.held = False  # an administrator wants no sessions on it
        self.seats, self.memory = 0, 0
        self.code = ""  # a digest of what it runs
        self.pid: int | None = None  # of a process that the front has started
        self.sessions: set[Tenant] = set()
        self.chats = 0
        self.full_until = 0.0  # it said that it was full
        self.last_answer_at = time.monotonic()
        self._awaited = set[asyncio.Timeout]()
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else None
        transport = httpx.AsyncHTTPTransport(uds=self._path) if self._path else None
        base = "http://localhost" if self._path else address
        self.http = httpx.AsyncClient(
            base_url=base, transport=transport, timeout=httpx.Timeout(None, connect=_CONNECT),
            headers={"Host": "localhost"}, limits=httpx.Limits(max_connections=None),
        )  # fmt: skip

    @property
    def serves(self) -> bool:
        """Whether its process answers."""
        return self.state in ("ready", "draining")

    @property
    def free(self) -> int:
        """Seats that a session may have now."""
        if self.state != "ready" or self.held or time.monotonic() < self.full_until:
            return 0
        return max(0, self.seats - len(self.sessions) - self.chats)

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[ClientConnection]:
        """Opens a connection to the replica for one session."""
        options: dict[str, Any] = {
            "additional_headers": self.authorization,
            "max_size": None,
            "compression": None,
            "open_timeout": _CONNECT,
            "ping_interval": _PING_TIMEOUT,
            "ping_timeout": _PING_TIMEOUT,
            "close_timeout": 1.0,
            "proxy": None,
        }
        if self._path:
            made = unix_connect(self._path, f"ws://localhost{ROUTE}", **options)
        else:
            made = connect(f"ws{self.address.removeprefix('http')}{ROUTE}", **options)
        async with made as connection:
            yield connection

    @contextlib.asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """What is awaited here ends with httpx.ReadError once the replica is lost: one that is
        stuck, or whose machine is off, keeps its connections and says nothing more."""
        if not self.serves:
            raise httpx.ReadError("the replica is lost")
        try:
            async with asyncio.timeout(None) as awaited:
                self._awaited.add(awaited)
                try:
                    yield
                finally:
                    self._awaited.discard(awaited)
        except TimeoutError:
            raise httpx.ReadError("the replica is lost") from None

    def lose(self) -> None:
        """It is out of service: who waits for an answer of it does so no longer."""
        self.state = "dead"
        for awaited in self._awaited:
            awaited.reschedule(asyncio.get_running_loop().time())

    async def look(self, seconds: float) -> str:
        """Asks for its health; its `status`, `starting` while nothing decodes, or `silent`."""
        try:
            answer = await self.http.get("/health", timeout=seconds)
            body = answer.json()
        except (httpx.HTTPError, ValueError):
            return "silent"
        self.last_answer_at = time.monotonic()
        self.seats, self.memory = body.get("max_sessions", 0), body.get("memory_free", 0)
        self.code = str(body.get("code", ""))
        status = str(body.get("status", "silent"))
        return status if status != "ok" or body.get("decoders") else "starting"

    def describe(self) -> dict[str, Any]:
        """The replica's state, for an administrator."""
        return {
            "replica": self.number,
            "address": self.address,
            "state": "held" if self.held and self.state == "ready" else self.state,
            "pid": self.pid,
            "seats": self.seats,
            "sessions": len(self.sessions),
            "chats": self.chats,
            "memory_free": self.memory,
        }
