"""A replica's side of a front: the front holds the clients' sockets, and each session here is on a
connection of its own to the front.

    front -> replica   what is opened: `id`, `seq` (of its last event); of a session that goes on
                       its records (`kept`) and how many pictures follow, each as a message
                       then the client's messages, numbered: `n`, `age` (seconds since it came),
                       `over` (a limit of its key that it exceeds), `text` where it is one, and
                       its bytes;
                       or `end`: the session is to end
    replica -> front   `events` and the `record` that covers them (inference/session/journal.py)
                       with its pictures, in one message: what the front has is always whole
                       `kick`: the client's socket is to be closed, the session lives on
                       `close`: the session is over
                       `refused`: it was not opened

Whatever ends the connection ends the session here. The front goes on with it elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI
from starlette.websockets import WebSocket, WebSocketDisconnect
from torch import Tensor

from inference.engine.engine import EngineFull
from inference.serve.hub import Hub, LiveSession
from inference.serve.session_socket import NORMAL, POLICY, TRY_LATER
from inference.serve.socket import Connection
from inference.serve.wire import ROUTE, pack, unpack
from inference.session.from_journal import rebuild
from inference.session.handle import SessionClosed
from inference.session.journal import Journal, Record


def add_front_route(app: FastAPI, hub: Hub, key: str) -> None:
    """The route for a front that knows the key."""

    @app.websocket(ROUTE)
    async def front(socket: WebSocket) -> None:
        await socket.accept()
        token = socket.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(token.encode("latin-1"), key.encode()):
            return await socket.close(POLICY, "a wrong or no front key")
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the front has gone
            await _serve(socket, hub)


async def _serve(socket: WebSocket, hub: Hub) -> None:
    opening, _ = unpack(await socket.receive_bytes())
    pictures = {}
    for _ in range(opening.get("pictures", 0)):
        values, (data,) = unpack(await socket.receive_bytes())
        pictures[values["picture"]] = _tile(data, hub.runner.tile)
    journal = Journal(hub.runner.engine.window, hub.runner.engine.sinks)
    try:
        if opening.get("kept") is None:
            live = await hub.open(opening["id"], opening["seq"])
        else:
            live = await _rebuild(hub, opening, pictures, journal)
    except (EngineFull, SessionClosed, ValueError) as error:
        full = isinstance(error, EngineFull | SessionClosed)
        await socket.send_bytes(pack({"refused": str(error), "full": full}))
        return await socket.close(TRY_LATER)
    await FrontConnection(hub, live, socket, opening["seq"], journal).run()


async def _rebuild(
    hub: Hub, opening: dict[str, Any], pictures: dict[int, Tensor], journal: Journal
) -> LiveSession:
    kept = {**opening["kept"], "seq": opening["seq"]}
    options = {"reason": opening["reason"], "journal": journal, "log_limit": hub.limits.replay}
    work = partial(rebuild, hub.rebuilder, kept, pictures, **options)
    with hub.memory.promised(hub.each.total):
        handle = await asyncio.get_running_loop().run_in_executor(hub.rebuilding, work)
        hub.hold(handle.log, hub.each.total)
    live = LiveSession(handle, opening["id"])
    hub.sessions[live.id] = live
    connection = kept["connection"]
    live.untouched, live.newest = connection["untouched"], connection["newest"]
    if connection["clock"] is not None:
        live.clock.set(connection["clock"] + opening["age"], time.monotonic())
    return live


class FrontConnection(Connection):
    """The connection of a session to its front."""

    def __init__(
        self, hub: Hub, live: LiveSession, socket: WebSocket, last_seq: int, journal: Journal
    ) -> None:
        super().__init__(hub, live, socket, last_seq)
        loop, self._ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(self._ready.set)

        self._journal, journal.wake = journal, wake
        self._skipped = journal.connection.get("skipped", 0)
        journal.connection = self._facts()
        self._session.keep(journal)

    def _left(self) -> None:
        self._live.close("its front has gone on without it")
        self._hub.forget(self._live)

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        with super()._change():
            yield
            if self._announced is None:  # a picture that is to come counts with its announcement
                self._journal.last_message = self._number
            self._journal.connection = self._facts()

    def _facts(self) -> dict[str, Any]:
        live = self._live
        clock = live.clock.passed(time.monotonic())
        return {
            "untouched": live.untouched,
            "newest": live.newest,
            "clock": clock,
            "skipped": self._skipped,
        }

    async def _take(self, text: str | None, data: bytes | None) -> bool:
        assert data is not None
        values, blobs = unpack(data)
        if "end" in values:
            code, reason = values["end"]
            self._live.close(reason, code)
            return True
        self._number, self._age = values["n"], values["age"]
        self._over = values.get("over", "")
        (sent,) = blobs
        text = sent.decode() if values.get("text") else None
        if not await super()._take(text, sent if text is None else None):
            self._too_many = False
        return True

    async def close(self, code: int, reason: str) -> None:
        """Too many errors: that is the client's end, not the session's."""
        await self._socket.send_bytes(pack({"kick": [code, reason]}))

    async def _write(self) -> None:
        while True:
            await self._ready.wait()
            self._ready.clear()
            closed = self._held.log.closed
            found = self._session.read_journal()
            if self._hub.closing or self._hub.failed:
                return  # the front goes on from what it has
            if found is not None:
                await self._send(*found)
            if closed:
                break
        await self._socket.send_bytes(pack({"close": self._held.end}))
        await self._socket.close(NORMAL)

    async def _send(self, record: Record, pictures: dict[int, Tensor]) -> None:
        """The record, and the events that it covers."""
        after = self._held.log.after(self._seq, 2**30)
        events = [event.as_dict() for event in after if event.seq <= record["seq"]]
        self._seq = record["seq"]
        values = {"record": record, "events": events, "pictures": list(pictures)}
        blobs = [picture.contiguous().numpy().tobytes() for picture in pictures.values()]
        await asyncio.wait_for(self._socket.send_bytes(pack(values, blobs)), self.limits.send)


def _tile(data: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(3, size, size)
