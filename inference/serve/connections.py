"""Who may connect, and for how long a connection may say nothing: around uvicorn's own protocol."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from inference.serve.limits import Limits


def known_host(host: str | None, allowed: Sequence[str]) -> bool:
    """Whether a request's `Host` is a name of this server: an address, this machine's names, or one
    of `allowed` (lower case; `*`: any).

    A page whose own name is made to point here (DNS rebinding) sends that name, never an address.
    """
    if host is None or "*" in allowed:
        return True
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


def http_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's connection, with two more limits: how many there are, and how long one may take for
    the headers of a request."""

    class Limited(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
            else:
                self._look_again(None)

        def connection_lost(self, error: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(error)

        def _look_again(self, seen: object) -> None:
            self._timer = self.loop.call_later(limits.headers, self._look, seen)

        def _look(self, seen: object) -> None:
            """Ends the connection if there was no new request since the last look."""
            # Of a connection that ends, TLS no longer knows the protocol. Another one: a WebSocket.
            if self.transport.is_closing() or self.transport.get_protocol() is not self:
                return
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self.cycle is seen:
                self.transport.abort()
            else:
                self._look_again(self.cycle if idle else self)

    return Limited
