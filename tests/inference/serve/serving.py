"""A server on real sockets, in a thread of the test's process, and a client of its WebSockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import httpx
import numpy as np
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from data_pipeline.prompts import STAGE_FORMS
from inference.engine.engine import Engine
from inference.export_info import ExportInfo
from inference.serve.access import Access
from inference.serve.app import make_app
from inference.serve.hub import Hub
from inference.serve.limits import Limits
from inference.serve.media_files import MediaFolders
from inference.serve.metrics import Metrics
from inference.serve.server import Certificate, Server, server_config
from inference.session.runner import Runner
from tests.waiting import PATIENCE, until

CHAT = "/v1/chat/completions"
# Options of a client's socket. Without pings of its own: the server reads them behind all that
# waits, and the client would take it for dead.
PATIENT: dict[str, Any] = {
    "open_timeout": PATIENCE, "close_timeout": PATIENCE, "ping_interval": None,
}  # fmt: skip
T = TypeVar("T")


@dataclass
class Running:
    """A server that runs: its address and what it holds."""

    host: str
    secure: bool
    hub: Hub
    server: Server
    thread: threading.Thread

    @property
    def http(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.host}"

    def open(self, query: str = "", **options: Any) -> Client:
        options = {**PATIENT, **options}
        return Client(connect(f"ws://{self.host}/v1/realtime{query}", max_size=None, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.http + path, timeout=PATIENCE, **options)

    def post(self, path: str = CHAT, **options: Any) -> httpx.Response:
        return httpx.post(self.http + path, timeout=PATIENCE, **options)

    def wait(self, sessions: int) -> None:
        """Until so many sessions are open in the engine, and no socket is left of one that is
        over: it is told so after its place is free."""
        until(lambda: self.hub.runner.sessions == sessions)
        until(lambda: not self.between_turns(self._ending))

    def wait_left(self, session: str) -> None:
        """Until the server knows that the client of a session has left."""
        live = self.hub.sessions[session]
        until(lambda: live.socket is None)

    def between_turns(self, function: Callable[[], T]) -> T:
        """What a function returns in the server's event loop."""
        return between_turns(self.server, function)

    def _ending(self) -> list[str]:
        held = self.hub.sessions.values()
        return [live.id for live in held if live.socket is not None and live.handle.log.closed]


def between_turns(server: Server, function: Callable[[], T]) -> T:
    """What a function returns in a server's event loop: nobody there is in the middle of something,
    as to a thread beside it he may seem to be."""

    async def call() -> T:
        return function()

    loop = server.servers[0].get_loop()
    return asyncio.run_coroutine_threadsafe(call(), loop).result(PATIENCE)


@contextlib.contextmanager
def serving(
    engine: Engine,
    limits: Limits | None = None,
    *,
    key: str | None = None,
    access: Access | None = None,
    stage: str | None = "realtime_sft",
    origins: Sequence[str] = (),
    hosts: Sequence[str] = (),
    certificate: Certificate | None = None,
    folders: Sequence[Path] = (),
) -> Iterator[Running]:
    metrics, limits = Metrics(), limits or Limits()
    runner = Runner(engine, metrics.measured)
    hub = Hub(
        runner, limits, metrics, ExportInfo(STAGE_FORMS.get(stage), stage), MediaFolders(folders)
    )
    access = access or Access(api_key=key)
    app = make_app(hub, access, origins, hosts)
    tile = runner.tile if access.front_key is not None else None
    server = Server(server_config(app, "127.0.0.1", 0, limits, certificate, tile), hub)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"127.0.0.1:{port}", certificate is not None, hub, server, thread)
    finally:
        server.should_exit = True
        thread.join(timeout=PATIENCE)
        runner.close()
    assert not thread.is_alive()
    assert not engine.slots  # nothing leaks


@contextlib.contextmanager
def standing_still(engine: Engine, steps: int = 0) -> Iterator[None]:
    """After so many more steps the engine takes none until the block ends: what a test does inside
    comes before them, however long it takes."""
    step, going_on, taken = engine.step, threading.Event(), itertools.count()

    def held(of_step: Any) -> Any:
        if next(taken) >= steps:
            going_on.wait(PATIENCE)
        return step(of_step)

    with mock.patch.object(engine, "step", held):
        try:
            yield
        finally:
            going_on.set()


def self_signed(folder: Path) -> tuple[str, str]:
    """Files of a certificate and its key, for `localhost`."""
    chain, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", chain],
        check=True, capture_output=True,
    )  # fmt: skip
    return chain, key


class Client:
    """A WebSocket that reads events. Leaving the `with` drops the socket without a goodbye."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen: list[dict[str, Any]] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, type: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": type, **fields}))

    def update(self, **session: Any) -> None:
        self.send("session.update", session=session)

    def ask(self, text: str) -> None:
        part = {"type": "input_text", "text": text}
        item = {"type": "message", "role": "user", "content": [part]}
        self.send("conversation.item.create", item=item)

    def frame(self, data: bytes, ts: float | None = None, **more: Any) -> None:
        """Binary, announced where there is something to say of it."""
        if ts is not None or more:
            self.send("input_image_buffer.append", ts=ts, **more)
        self.socket.send(data)

    def next(self, seconds: float = PATIENCE) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.socket.recv(timeout=seconds))
        self.seen.append(event)
        return event

    def until(self, type: str, **fields: Any) -> dict[str, Any]:
        """Reads up to the first event of this type with these fields."""
        while True:
            event = self.next()
            if event["type"] == type and all(event.get(k) == v for k, v in fields.items()):
                return event

    def rest(self) -> list[dict[str, Any]]:
        """All events up to the end of the connection."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.next()
        return self.seen

    @property
    def close_code(self) -> int | None:
        """Of the close frame, after the connection has ended."""
        self.rest()
        return self.socket.close_code


def audited(log: Path) -> list[dict[str, Any]]:
    """The audit log so far; a line that is half written is not there yet."""
    whole = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def jpeg(seed: int = 0, size: tuple[int, int] = (60, 40)) -> bytes:
    """A picture of noise, (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
