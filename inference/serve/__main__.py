"""Serves a model: sessions over WebSockets, OpenAI's chat completions, a page, metrics.

python -m inference.serve --checkpoint DIR
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from starlette.types import ASGIApp

from data_pipeline.commands import DONE, FAILED, CommandParser, report_error
from inference import cli
from inference.serve import media
from inference.serve.app import make_app
from inference.serve.connections import http_protocol
from inference.serve.hub import Hub
from inference.serve.limits import Limits
from inference.serve.metrics import Metrics
from inference.session.runner import Runner

PROGRAM = "python -m inference.serve"


class Server(uvicorn.Server):
    """uvicorn's server, which closes the sessions before it closes their sockets."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self._hub = hub

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where the engine has, which nothing in this process can replace."""
        return bool(self._hub.runner.failed) or await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        while not (self._hub.decodes or self.should_exit):
            await asyncio.sleep(0.02)
        await super().startup(sockets)
        self._hub.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await self._hub.close()
        await super().shutdown(sockets)


_LIMIT_HELP = {  # the limits that have a flag, --limit_NAME
    "frame_bytes": "maximum size of a frame in bytes",
    "pixels": "maximum number of pixels of a picture",
    "prompt_chars": "maximum number of characters of a prompt",
    "fps": "maximum number of frames per second of a session",
    "body_wall": "seconds that a chat request may take to come",
    "clip_cpu": "seconds of processor time for decoding a medium of a chat request",
    "clip_wall": "seconds for the same on the clock",
    "decoders": "number of processes that decode pictures of sessions, and of those for chat",
    "memory": "maximum memory in bytes for decoding a medium",
    "held": "maximum memory in bytes of all chat requests that are read or wait",
    "connections": "maximum number of connections",
    "grace": "seconds that a session without a client waits for it to come back",
    "idle": "seconds without input after which a session is closed",
    "step": "seconds of one step of the engine after which /health says that it is stuck",
    "send": "seconds that a client may take to read an event",
    "replay": "number of past events kept for a client that comes back",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    cli.add_engine_flags(parser)
    cli.flag(parser, "host", default="127.0.0.1", metavar="ADDRESS",
             help="address to listen on; 127.0.0.1: this machine only")  # fmt: skip
    cli.flag(parser, "port", type=port, default=8000, metavar="N",
             help="port to listen on; 0: a free one")  # fmt: skip
    cli.flag(parser, "max_sessions", type=cli.positive_int, default=4, metavar="N",
             help="maximum number of sessions and answers at once")  # fmt: skip
    cli.flag(parser, "api_key", type=key, default=os.environ.get("MOSS_API_KEY"), metavar="KEY",
             help="key that clients must send (default: $MOSS_API_KEY, else none)")  # fmt: skip
    cli.flag(parser, "allow_origin", action="append", default=[], metavar="URL", type=origin,
             help="another site whose pages may use the server, https://app.example; *: any site; "
             "may be given again")  # fmt: skip
    cli.flag(parser, "allow_host", action="append", default=[], metavar="NAME", type=str.lower,
             help="a name by which clients reach the server, video.example; *: any; an address, "
             "localhost and the machine's name need none; may be given again")  # fmt: skip
    cli.flag(parser, "ssl_certfile", metavar="FILE",
             help="certificate (chain) in PEM form: the server speaks HTTPS, which browsers want "
             "before they give a page of another machine a camera")  # fmt: skip
    cli.flag(parser, "ssl_keyfile", metavar="FILE",
             help="its private key, where that is not in the same file")  # fmt: skip
    defaults = Limits()
    for name, text in _LIMIT_HELP.items():
        default = getattr(defaults, name)
        kind = cli.positive_int if isinstance(default, int) else cli.positive
        cli.flag(parser, f"limit_{name}", type=kind, default=default, metavar="N", help=text)
    return parser.parse_args(argv)


def origin(text: str) -> str:
    """A flag's origin, as browsers write it."""
    parts = urlsplit(text.lower().rstrip("/"))
    if text not in ("*", "null") and not (parts.scheme and parts.netloc and not parts.path):
        raise argparse.ArgumentTypeError(f"{text}: write SCHEME://HOST[:PORT], *, or null")
    return text.lower().rstrip("/")


def key(text: str) -> str:
    """A flag's key: an empty one is a mistake (an unset variable), not the wish to have none."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: for none, leave it out and unset $MOSS_API_KEY")
    return text


def port(text: str) -> int:
    """A flag's port."""
    if not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to {2**16 - 1}")
    return int(text)


def listen(host: str, port: int) -> socket.socket:
    """The socket of an address; CommandError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        words = f"{error.strerror or error}: give another --host or --port"
        raise cli.CommandError(f"--host {host} --port {port}: {words}") from None


@dataclass(frozen=True)
class Certificate:
    """For HTTPS, in PEM form. key: of the private key; None: it is in `chain`, too."""

    chain: Path
    key: Path | None = None

    @classmethod
    def of_flags(cls, chain: str | None, key: str | None) -> Certificate | None:
        """None: HTTP. CommandError where the files are not a certificate and its key."""
        if chain is None and key is None:
            return None
        if chain is None:
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
    app: ASGIApp, host: str, port: int, limits: Limits, certificate: Certificate | None = None
) -> uvicorn.Config:
    """How uvicorn runs the routes."""
    return uvicorn.Config(
        app,
        ssl_certfile=certificate.chain if certificate else None,
        ssl_keyfile=certificate.key if certificate else None,
        host=host,
        port=port,
        log_level="warning",
        ws_max_size=2 * limits.frame_bytes,  # base64 in JSON is a third larger
        ws_per_message_deflate=False,
        http=http_protocol(limits),
        ws_max_queue=4,  # messages that wait to be read; the client waits with more
        ws_ping_interval=5,
        ws_ping_timeout=10,
        timeout_graceful_shutdown=5,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with cli.one_line_errors(PROGRAM):
        limits = Limits(**{name: getattr(args, f"limit_{name}") for name in _LIMIT_HELP})
        certificate = Certificate.of_flags(args.ssl_certfile, args.ssl_keyfile)
        export = cli.export_info(args)
        if export.watches is None:
            cli.note(
                f"{args.checkpoint} does not say its prompt form: it may not have learned to watch"
            )
        if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
            cli.note(f"warning: {args.host} is open to the network, and there is no --api_key")
        if "*" in args.allow_origin and not args.api_key:
            cli.note("warning: any site's page may use this server, and there is no --api_key")
        # Before the model is loaded, which takes long; other ranks of torchrun serve nothing.
        door = listen(args.host, args.port) if cli.leads() else socket.socket()
        if cli.leads():
            media.prepare()
        metrics = Metrics()
        with door, Runner(cli.load(args, args.max_sessions), metrics.measured) as runner:
            hub = Hub(runner, limits, metrics, export)
            app = make_app(hub, args.api_key, args.allow_origin, args.allow_host)
            # uvicorn raises SIGTERM again after a clean shutdown, which must not kill the process.
            signal.signal(signal.SIGTERM, lambda *_: None)
            host = f"[{args.host}]" if ":" in args.host else args.host
            scheme = "https" if certificate else "http"
            cli.note(f"{scheme}://{host}:{door.getsockname()[1]}/")
            config = server_config(app, args.host, args.port, limits, certificate)
            server = Server(config, hub)
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
                signal.signal(signal.SIGHUP, server.handle_exit)  # as SIGTERM, which uvicorn takes
            server.run(sockets=[door])
            if runner.failed:
                report_error(PROGRAM, runner.failed)
    return FAILED if runner.failed else DONE


if __name__ == "__main__":
    raise SystemExit(main())
