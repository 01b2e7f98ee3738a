"""The flags of `python -m inference.serve`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from data_pipeline.commands import CommandParser, finite_number, whole_number
from inference import cli
from inference.serve.limits import Limits

PROGRAM = "python -m inference.serve"
DESCRIPTION = """Serves a model: sessions over WebSockets, chat completions, a page, metrics.

python -m inference.serve --checkpoint DIR [--replicas N]
"""
LIMIT_HELP = {  # the limits that have a flag, --limit_NAME
    "frame_bytes": "maximum size of a frame of a session in bytes",
    "pixels": "maximum number of pixels of a picture",
    "prompt_chars": "maximum number of characters of a prompt",
    "fps": "maximum number of frames per second of a session",
    "body_wall": "seconds that a chat request may take to come",
    "body_bytes": "maximum size of a chat request in bytes",
    "frames": "maximum number of frames of a chat request",
    "clip_cpu": "seconds of processor time for decoding a medium of a chat request",
    "clip_wall": "seconds for the same on the clock",
    "decoders": "number of processes that decode pictures of sessions, and of those for chat",
    "memory": "maximum memory in bytes for decoding a medium",
    "sessions_memory": "maximum memory in bytes of all sessions: keys and values, pictures; 0: "
    "what --max_sessions take, and those that are parked",
    "held": "maximum memory in bytes of all chat requests that are read or wait",
    "connections": "maximum number of connections",
    "grace": "seconds that a session without a client waits for it to come back",
    "audit_bytes": "size in bytes of a file of the audit log, after which a new one begins",
    "audit_files": "number of its older files that are kept",
    "idle": "seconds without input after which a session is closed",
    "silence": "seconds without an answer after which a replica is taken for dead",
    "step": "seconds of one step of the engine after which /health says that it is stuck",
    "send": "seconds that a client may take to read an event",
    "replay": "number of past events kept for a client that comes back",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=DESCRIPTION)
    cli.add_engine_flags(parser)
    cli.flag(parser, "host", default="127.0.0.1", metavar="ADDRESS",
             help="address to listen on; 127.0.0.1: this machine only")  # fmt: skip
    cli.flag(parser, "port", type=port, default=8000, metavar="N",
             help="port to listen on; 0: a free one")  # fmt: skip
    cli.flag(parser, "max_sessions", type=whole_number(above=0), default=4, metavar="N",
             help="maximum number of sessions and answers at once")  # fmt: skip
    cli.flag(parser, "api_key", type=key, default=os.environ.get("MOSS_API_KEY"), metavar="KEY",
             help="key that clients must send (default: $MOSS_API_KEY, else none)")  # fmt: skip
    cli.flag(parser, "keys", metavar="FILE",
             help="API keys with names and limits, in YAML or JSON: docs/serving.md")  # fmt: skip
    cli.flag(parser, "audit_log", metavar="FILE",
             help="append a line of JSON for each session and request, without its contents, to "
             "FILE")  # fmt: skip
    cli.flag(parser, "otel", type=endpoint, metavar="URL",
             help="send traces to URL by OTLP over HTTP, http://127.0.0.1:4318")  # fmt: skip
    cli.flag(parser, "allow_origin", action="append", default=[], metavar="URL", type=origin,
             help="another site whose pages may use the server, https://app.example; *: any site; "
             "may be given again")  # fmt: skip
    cli.flag(parser, "allow_host", action="append", default=[], metavar="NAME", type=str.lower,
             help="a name by which clients reach the server, video.example; *: any; an address, "
             "localhost and the machine's name need none; may be given again")  # fmt: skip
    cli.flag(parser, "allow_media", action="append", default=[], metavar="FOLDER",
             help="a folder of pictures and videos that chat requests may name as file: URLs; may "
             "be given again")  # fmt: skip
    cli.flag(parser, "ssl_certfile", metavar="FILE",
             help="certificate (chain) in PEM form: the server speaks HTTPS, which browsers want "
             "before they give a page of another machine a camera")  # fmt: skip
    cli.flag(parser, "ssl_keyfile", metavar="FILE",
             help="its private key, where that is not in the same file")  # fmt: skip
    add_replica_flags(parser)
    defaults = Limits()
    for name, text in LIMIT_HELP.items():
        default = getattr(defaults, name)
        whole = whole_number(above=0) if default else whole_number(least=0)
        kind = whole if isinstance(default, int) else finite_number(above=0)
        cli.flag(parser, f"limit_{name}", type=kind, default=default, metavar="N", help=text)
    args = parser.parse_args(argv)
    if args.gpus_per_replica > 1 and not args.replicas:
        parser.error("--gpus_per_replica: is of --replicas; one server on several GPUs: torchrun")
    return args


def add_replica_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a front, and of a replica."""
    cli.flag(parser, "replicas", type=whole_number(least=0), default=0, metavar="N",
             help="number of replicas of the model on this machine, each a process on GPUs of its "
             "own, behind this server; 0: the model runs in this process")  # fmt: skip
    cli.flag(parser, "gpus_per_replica", type=whole_number(above=0), default=1, metavar="N",
             help="number of GPUs that a replica is shared among (tensor parallelism)")  # fmt: skip
    cli.flag(parser, "replica_urls", type=urls, default=[], metavar="URLS",
             help="replicas on other machines, http://HOST:PORT,...; they have the same "
             "--front_key")  # fmt: skip
    cli.flag(parser, "front_key", type=key, default=os.environ.get("MOSS_FRONT_KEY"), metavar="KEY",
             help="of a replica on another machine: key of the front that may move sessions to it "
             "(default: $MOSS_FRONT_KEY, else none)")  # fmt: skip
    cli.flag(parser, "unix_socket", metavar="PATH",
             help="listen on a Unix socket, in place of --host and --port")  # fmt: skip


def urls(text: str) -> list[str]:
    """A flag's list of addresses."""
    found = [one.strip().rstrip("/") for one in text.split(",") if one.strip()]
    for one in found:
        parts = urlsplit(one)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path:
            raise argparse.ArgumentTypeError(f"{one}: write http://HOST:PORT")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: a replica is named twice")
    return found


def endpoint(text: str) -> str:
    """A flag's address of a collector."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"{text}: write http://HOST:PORT")
    return text.rstrip("/").removesuffix("/v1/traces")


def origin(text: str) -> str:
    """A flag's origin, as browsers write it."""
    parts = urlsplit(text.lower().rstrip("/"))
    if text not in ("*", "null") and not (parts.scheme and parts.netloc and not parts.path):
        raise argparse.ArgumentTypeError(f"{text}: write SCHEME://HOST[:PORT], *, or null")
    return text.lower().rstrip("/")


def key(text: str) -> str:
    """A flag's key: an empty one is a mistake (an unset variable), not the wish to have none."""
    text = text.strip()  # no client can send the line end of a file that a variable was set from
    if not text:
        raise argparse.ArgumentTypeError("is empty: for none, leave it out and unset $MOSS_API_KEY")
    if not text.isprintable():
        raise argparse.ArgumentTypeError("has a line end or another character that no client sends")
    return text


def port(text: str) -> int:
    """A flag's port."""
    if not 0 <= int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to {2**16 - 1}")
    return int(text)
