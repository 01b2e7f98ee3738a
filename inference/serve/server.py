"""Runs uvicorn's server: how it listens, its limits, how it ends."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import uvicorn
from starlette.types import ASGIApp

from data_pipeline.open_files import allow_open_files
from inference import cli
from inference.serve.connections import http_protocol, socket_protocol
from inference.serve.limits import Limits
from inference.serve.wire import largest_message

_TRIES = 20  # to find a port that is free at several addresses
_OTHER_FILES = 512  # of a process: libraries, decoders, media of chat requests

# Of a proxy on this machine, whose X-Forwarded-For says who asks; the last one at a socket of `::`.
_PROXIES = "127.0.0.1,::1,::ffff:127.0.0.1"


class Served(Protocol):
    """What a Server serves."""

    limits: Limits

    @property
    def failed(self) -> str:
        """Why it has ended by itself; "": it has not."""

    @property
    def decodes(self) -> bool:
        """Whether it decodes media, so that it may listen now."""

    def start(self) -> None:
        """Starts its work in the event loop, before the first request."""

    async def close(self) -> None:
        """Ends all sessions."""


class Server(uvicorn.Server):
    """uvicorn's server, which closes the sessions before it closes their sockets."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self._served = served

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; also true where the engine has ended, which nothing in this process can
        replace."""
        return bool(self._served.failed) or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        while not (self._served.decodes or self.should_exit):
            await asyncio.sleep(0.02)
        if self.config.is_ssl:  # uvicorn does not say how long a handshake may take: a minute
            loop, seconds = asyncio.get_running_loop(), self._served.limits.headers
            made = partial(loop.create_server, ssl_handshake_timeout=seconds)
            setattr(loop, "create_server", made)  # noqa: B010
        await super().startup(sockets)
        self._served.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._served.close()
        await super().shutdown(sockets)


def allow_files(limits: Limits) -> None:
    """Raises this process's limit of open files to what its connections need, or as far as the
    system lets it, and says so where that is not enough. A front has another one for each."""
    needed = 2 * limits.connections + _OTHER_FILES
    allowed = allow_open_files(needed)
    if allowed < needed:
        words = f"{limits.connections} connections may need {needed} open files"
        cli.note(f"warning: {words}, and this process may have {allowed}: see `ulimit -Hn`")


class ListeningSockets(list[socket.socket]):
    """The sockets on which a server listens; leaving the context closes them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for listening in self:
            listening.close()


def url_of(host: str, sockets: ListeningSockets, certificate: Certificate | None) -> str:
    """The address of a server; `host` as it was given."""
    if sockets[0].family == socket.AF_UNIX:
        return f"unix:{sockets[0].getsockname()}"
    host = f"[{host.strip('[]')}]" if ":" in host else host
    return f"{'https' if certificate else 'http'}://{host}:{sockets[0].getsockname()[1]}/"


def is_local(host: str) -> bool:
    """Whether a server of this host is reached from its own machine alone."""
    return host == "localhost" or is_loopback(host.strip("[]"))


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine alone, also one of IPv4 as a socket of `::` has it."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def listen(host: str, port: int, path: str | None = None) -> ListeningSockets:
    """The sockets of a host, one for each of its addresses, or of a path; CommandError where they
    cannot be had. `::` takes IPv4, too, as most servers do."""
    if path is not None:
        return ListeningSockets([_listen_at(path)])
    flags = f"--host {host} --port {port}"
    if host in ("", "*") or "/" in host or re.fullmatch(r"[^:]*:\d*|\[.*\]:\d*", host):
        words = "write an address alone: 127.0.0.1, 0.0.0.0 (all of IPv4), :: (all)"
        raise cli.CommandError(f"--host {host!r}: {words}")
    try:
        found = dict.fromkeys(socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM))
        for _ in range(_TRIES):
            try:
                return _listen_to_all(found, port)
            except OSError as error:
                # A port that is free at the first of several addresses may be taken at the next.
                if port or error.errno != errno.EADDRINUSE:
                    raise
                last_error = error
        raise last_error
    except (OSError, UnicodeError) as error:  # the latter: a part of a name is too long, or empty
        why = getattr(error, "strerror", None) or error.__cause__ or error
        if getattr(error, "errno", None) == errno.EINVAL and ":" in host:
            why = "an address of one interface, as fe80::1 is, needs its name: fe80::1%eth0"
        raise cli.CommandError(f"{flags}: {why}: give another --host or --port") from None


def _listen_to_all(found: Iterable[tuple[Any, ...]], port: int) -> ListeningSockets:
    """A socket for each address that the machine has, all with one port (0: a free one)."""
    sockets = ListeningSockets()
    missing: OSError | None = None
    try:
        for family, _, _, _, (name, _, *scope) in found:
            port = sockets[0].getsockname()[1] if sockets else port
            try:
                sockets.append(_listen(family, (name, port, *scope)))
            except OSError as error:
                # A name may have addresses of a family that the machine does not use.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if missing is not None and not sockets:
            raise missing
    except OSError:
        sockets.__exit__()
        raise
    return sockets


def _listen(family: int, address: tuple[Any, ...]) -> socket.socket:
    both = False
    if family == socket.AF_INET6:
        named = ipaddress.IPv6Address(address[0])
        both = socket.has_dualstack_ipv6() and (named.is_unspecified or bool(named.ipv4_mapped))
    return socket.create_server(address, family=family, dualstack_ipv6=both)


def _listen_at(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    _remove_left(path)
    try:
        made.bind(path)
    except OSError as error:
        raise cli.CommandError(f"--unix_socket {path}: {error.strerror or error}") from None
    made.listen()
    return made


def _remove_left(path: str) -> None:
    """Removes the socket file of a server that has ended, to which no other could bind."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    except ConnectionRefusedError:  # it is a socket, or another file, and nobody listens
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    except OSError:
        pass  # nothing is there, or binding to it says what is wrong


@dataclass(frozen=True)
class Certificate:
    """A certificate for HTTPS, in PEM form. key: the file of the private key; None: it is in
    `chain`, too."""

    chain: Path
    key: Path | None = None

    @classmethod
    def of_flags(cls, chain: str | None, key: str | None) -> Certificate | None:
        """The certificate of the flags; None: HTTP. CommandError where the files are not a
        certificate and its key."""
        if not (chain or key):
            return None
        if not chain:
            raise cli.CommandError("--ssl_keyfile: --ssl_certfile is missing")
        found = cls(Path(chain), Path(key) if key else None)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # A key with a password would ask for it here.
            context.load_cert_chain(found.chain, found.key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            files = f"--ssl_certfile {chain}" + (f" --ssl_keyfile {key}" if key else "")
            raise cli.CommandError(
                f"{files}: not a certificate and its key without password, in PEM form ({error})"
            ) from None
        return found


def server_config(
    app: ASGIApp,
    host: str,
    port: int,
    limits: Limits,
    certificate: Certificate | None = None,
    tile: int | None = None,
) -> uvicorn.Config:
    """The configuration with which uvicorn runs the routes. tile: as in `largest_message`."""
    return uvicorn.Config(
        app,
        ssl_certfile=certificate.chain if certificate else None,
        ssl_keyfile=certificate.key if certificate else None,
        host=host,
        port=port,
        forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", _PROXIES),
        log_level="warning",
        ws_max_size=largest_message(limits, tile),
        ws_per_message_deflate=False,
        http=http_protocol(limits),
        ws=socket_protocol(limits),
        ws_ping_interval=5,
        ws_ping_timeout=10,
        timeout_graceful_shutdown=5,
    )
