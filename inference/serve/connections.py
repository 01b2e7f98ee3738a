"""Limits connections around uvicorn's protocols: who may connect, and how long one may be idle."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import h11
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame, Opcode

from inference.serve.answers import COMMENT
from inference.serve.chat import refusal
from inference.serve.framing import Framing
from inference.serve.limits import Bucket, Limits, Refused
from inference.serve.session_socket import POLICY

_HOST = re.compile(r"(\[[0-9a-z:.%]+\]|[0-9a-z._-]+)(:[0-9]{1,5})?", re.IGNORECASE)
_PIECE = 2**14  # bytes of a WebSocket that are read at once
_LOOKS = 0.2  # seconds between looks at whether a client that says nothing more has gone
_GOODBYE = 2.0  # seconds in which a client that is refused may read why
_PARTS = 4096  # parts of messages, pings and pongs a second; twice as many at once
_TOO_MANY = f"more than {_PARTS} parts of messages and pings a second"


def is_allowed_host(host: str | None, allowed: Sequence[str]) -> bool:
    """Whether a request's `Host` is a name of this server: an address, this machine's names, or one
    of `allowed` (lower case; `*`: any).

    A page whose own name is made to point here (DNS rebinding) sends that name, never an address.
    """
    if host is None or "*" in allowed:
        return True
    if not _HOST.fullmatch(host):
        return False
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    names = {*allowed, "localhost", socket.gethostname().lower()}
    if name in names or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Unread:
    """Aborts a connection whose client has read nothing for so many seconds of what waits for it:
    neither closing it nor a ping would do so, as long as the client's machine answers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop, self._seconds = loop, seconds
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, transport: asyncio.Transport, full: Callable[[], bool]) -> None:
        """Watches until `stop`. full: whether nothing more is written before the client reads."""
        self._look(transport, full, 0)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, transport: asyncio.Transport, full: Callable[[], bool], before: int) -> None:
        left = transport.get_write_buffer_size() if full() or transport.is_closing() else 0
        if left and left == before:
            transport.abort()
        else:
            self._timer = self._loop.call_later(self._seconds, self._look, transport, full, left)


class _LimitedConnection(H11Protocol):
    """uvicorn's connection, with more limits: how many there are, how long one may take for the
    headers of a request and to read an answer, and what a request may be (`framing.py`)."""

    limits: Limits
    conn: Framing

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = Framing(h11.SERVER)
        self._timer: asyncio.TimerHandle | None = None
        self._half: asyncio.TimerHandle | None = None
        self._unread = _Unread(self.loop, self.limits.send)
        self._idle_since = self.loop.time()
        self._ended = False  # to make room for others

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._make_room()
        if not self._ended:
            self._look_again(None)
            self._unread.watch(transport, lambda: self.flow.write_paused)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self._half is not None and (self._idle or self.cycle.more_body):
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open, for a client that says nothing more and still
        reads. One that has gone is told apart by what every client skips: its system refuses
        it."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if self.scheme == "https" or self.conn.their_http_version != b"1.1":
            return False  # TLS is not half closed, and HTTP/1.0 has no interim answers
        self._look_for_reader(0)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_watching()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._end_watching()  # the other protocol does it
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Instead of uvicorn's: says what is wrong, as all routes do."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = refusal(
                Refused("invalid_request", f"not an HTTP request: {self.conn.wrong}")
            )
            headers = [*response.raw_headers, (b"connection", b"close")]
            status = self.conn.status
            reason = HTTPStatus(status).phrase.encode()
            answer = h11.Response(status_code=status, headers=headers, reason=reason)
            for part in (answer, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()

    def _end_watching(self) -> None:
        self._unread.stop()
        for timer in (self._timer, self._half):
            if timer is not None:
                timer.cancel()

    def _look_for_reader(self, looks: int) -> None:
        made = self.transport.get_extra_info("socket")
        if made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        elif not self.transport.is_closing():
            if not looks & (looks - 1):  # ever more rarely: some clients skip a few answers only
                self._write_skipped()
            self._half = self.loop.call_later(_LOOKS, self._look_for_reader, looks + 1)

    def _write_skipped(self) -> None:
        """Writes what clients skip. More than once: a tunnel refuses it only after its own client
        has refused it."""
        nothing: h11.Event
        if self.conn.our_state is h11.SEND_RESPONSE:
            nothing = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
        elif self.conn.our_state is h11.SEND_BODY and self.conn.of_events:
            nothing = h11.Data(data=COMMENT.encode())
        else:
            return
        if not self.flow.write_paused:
            self.transport.write(self.conn.send(nothing) or b"")

    def _make_room(self) -> None:
        """Of too many connections, ends the one that has waited for a request for the longest time:
        this one, if all others have a request, or an answer that is not yet sent."""
        if len(self.connections) <= self.limits.connections:
            return
        mine = [one for one in self.connections if isinstance(one, _LimitedConnection)]
        if len(self.connections) - sum(one._ended for one in mine) <= self.limits.connections:
            return
        idle = [one for one in mine if one._idle and not one._ended]
        free = [one for one in idle if not one.transport.get_write_buffer_size()]
        # Those that are closed and wait for their clients to close have nothing to lose.
        first = min(
            free, key=lambda one: (not one.transport.is_closing(), one._idle_since), default=self
        )
        first._ended = True
        first.transport.abort()

    @property
    def _idle(self) -> bool:
        """Whether it waits for a request, or for the rest of its head."""
        return self.cycle is None or self.cycle.response_complete

    def _look_again(self, last_cycle: object) -> None:
        self._timer = self.loop.call_later(self.limits.headers, self._look, last_cycle)

    def _look(self, last_cycle: object) -> None:
        """Ends the connection if there was no new request since the last look."""
        if self.transport.is_closing():
            return
        if self._idle and self.cycle is last_cycle:
            self.transport.abort()
        else:
            self._look_again(self.cycle if self._idle else self)


def http_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol with these limits."""
    return type("LimitedConnection", (_LimitedConnection,), {"limits": limits})


def _whole(event: object) -> bool:
    """Whether a message has one part only. The session takes such a message, or drops and counts
    it."""
    if not isinstance(event, Frame) or event.opcode not in (Opcode.TEXT, Opcode.BINARY):
        return False
    return event.fin and len(event.data) > 0


class _LimitedSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, with more limits: how long a client may take to read, and how many parts
    of messages and pings it may send."""

    limits: Limits

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unread = _Unread(self.loop, self.limits.send)
        self._parts = Bucket(_PARTS)
        self._waited = False  # what came after a ping was not read at once
        self._refused = False  # nothing more of the client is read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._unread.watch(transport, lambda: not self.writable.is_set())

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread.stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # A part of six bytes takes as long as one of a thousand.
        for start in range(0, len(data), _PIECE):
            if not (self._refused or self.transport.is_closing()):
                super().data_received(data[start : start + _PIECE])
        self._waited |= self.read_paused

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            # Refused with an answer: uvicorn logs an error of the routes where nobody says so.
            self.handshake_complete = True

    def send_keepalive_ping(self) -> None:
        self._waited = self.read_paused
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """A client's answer may come after messages that wait until the session takes them."""
        if self._waited:
            self._waited = self.read_paused
            seconds = self.ping_timeout or 0.0
            self.pong_timer = self.loop.call_later(seconds, self.keepalive_timeout)
        else:
            super().keepalive_timeout()

    def handle_events(self) -> None:
        small = sum(not _whole(event) for event in self.conn.events)
        if self._parts.take(self.loop.time(), small):
            return super().handle_events()
        self.conn.events_received()
        self.conn.data_to_send()  # answers to its pings
        self.conn.fail(POLICY, _TOO_MANY)
        self.queue.put_nowait({"type": "websocket.disconnect", "code": POLICY, "reason": _TOO_MANY})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self._refuse()

    def _refuse(self) -> None:
        """Ends the connection when the client does, or soon. Closed with something unread it
        would be reset, and the client lose what is on its way to it."""
        self.close_sent = self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(_GOODBYE, self.transport.abort)


def socket_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's WebSocket protocol with these limits."""
    return type("LimitedSocket", (_LimitedSocket,), {"limits": limits})
