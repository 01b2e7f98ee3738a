"""A client that misbehaves, and checks that its sessions go on as they should. Used by soak.py."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tools.bench.replicas import picture

ASK_EVERY = 7  # frames
PATIENCE = 60.0  # seconds for an event
TRY_LATER = 1013
SETTINGS = {"source": "file", "pace": 4, "silence_bias": 4.0, "max_output_tokens": 9}
_PICTURES = 32


@cache
def frame(number: int) -> bytes:
    return picture(0, number)


@dataclass
class Visitor:
    """A client that runs one session after the other, and resumes each when its socket breaks
    off."""

    number: int
    host: str
    probability: float  # of a fault after a frame
    interval: float  # least seconds between two frames
    frame_bytes: int  # the server's limit
    rng: random.Random
    seconds: list[float] = field(default_factory=list)  # from each frame to its decision
    faults: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    gaps: int = 0
    wrong: list[str] = field(default_factory=list)  # what should not have happened
    name: str = ""  # of the session; empty: a new one
    seq: int = 0  # of its last event
    second: float = 0.0  # of its next frame
    http: httpx.AsyncClient = field(init=False)
    _deck: list[str] = field(default_factory=list)

    async def run(self, stop: Callable[[], bool]) -> None:
        """Runs sessions until `stop()`; then ends the last one."""
        # One for all requests, without certificates: to read those takes 40 ms, in which no other
        # visitor reads what it waits for.
        async with httpx.AsyncClient(verify=False, timeout=PATIENCE) as self.http:
            await self._visits(stop)

    async def _visits(self, stop: Callable[[], bool]) -> None:
        while not stop() and len(self.wrong) < 5:
            try:
                await self._visit(stop)
            except ConnectionClosed as error:
                code = error.rcvd.code if error.rcvd else None
                if code == TRY_LATER:  # those who have gone are not all noticed yet
                    self.faults["turned away"] += 1
                    await asyncio.sleep(0.2)
                else:
                    self.wrong.append(f"{self.number}: closed with {code}")
            except (OSError, TimeoutError, httpx.HTTPError) as error:
                self.wrong.append(f"{self.number}: {type(error).__name__}: {error}")

    async def _visit(self, stop: Callable[[], bool]) -> None:
        """Runs the session over one socket, until that ends."""
        query = f"?session={self.name}&last_seq={self.seq}" if self.name else ""
        url = f"ws://{self.host}/v1/realtime{query}"
        options: dict[str, Any] = {"max_size": None, "compression": None, "ping_interval": None}
        async with connect(url, open_timeout=PATIENCE, close_timeout=1.0, **options) as socket:
            if not self.name:
                self.seq, self.second = 0, 0.0
                created = await self.until(socket, "session.created")
                self.name = created["session"]["id"]
                session = {**SETTINGS, "seed": self.number}
                await self.send(socket, "session.update", session=session)
            while not stop():
                await self._show(socket)
                if self.rng.random() < self.probability:
                    fault = self._next_fault()
                    self.faults[fault] += 1
                    if await FAULTS[fault](self, socket):
                        return
            await self.send(socket, "session.close")
            with contextlib.suppress(ConnectionClosed):
                await self.until(socket, "session.closed")
            self.name = ""

    def _next_fault(self) -> str:
        """The next fault: each kind once in a random order, then again in another order."""
        if not self._deck:
            self._deck = self.rng.sample(list(FAULTS), len(FAULTS))
        return self._deck.pop()

    async def _show(self, socket: ClientConnection) -> None:
        """Sends a frame, and waits for its decision."""
        began, second = time.monotonic(), self.second
        asks = int(second) % ASK_EVERY == self.number % ASK_EVERY
        prompt = "What is new?" if asks else None
        await self.send(socket, "input_image_buffer.append", ts=second, prompt=prompt)
        await socket.send(frame((self.number + int(second)) % _PICTURES))
        while (await self.until(socket, "input_frame.processed"))["frame_at"] != second:
            pass
        took = time.monotonic() - began
        self.seconds.append(took)
        self.frames, self.second = self.frames + 1, second + 1
        await asyncio.sleep(max(0.0, self.interval - took))

    async def send(self, socket: ClientConnection, type: str, **fields: Any) -> None:
        await socket.send(json.dumps({"type": type, **fields}))

    async def until(self, socket: ClientConnection, type: str) -> dict[str, Any]:
        """Waits for the next event of a type. Raises TimeoutError."""
        while True:
            try:
                async with asyncio.timeout(PATIENCE):
                    event: dict[str, Any] = json.loads(await socket.recv())
            except TimeoutError:
                raise TimeoutError(f"no {type or 'end'} for {PATIENCE:g} s") from None
            self.gaps += event["seq"] != self.seq + 1
            self.seq = event["seq"]
            late = event["type"] == "error" and event["code"] == "nothing_to_cancel"
            if event["type"] == type and not late:
                return event
            if event["type"] == "error" and not late:
                self.wrong.append(f"{self.number}: {event['code']}: {event['message']}")


# Faults: whether the socket is over after it.


async def leaves(_: Visitor, socket: ClientConnection) -> bool:
    """Closes the socket in order, and comes back."""
    await socket.close()
    return True


async def killed(_: Visitor, socket: ClientConnection) -> bool:
    """Ends in the middle of a picture of 16 KiB."""
    socket.transport.write(b"\x82\xfe\x40\x00mask" + bytes(1000))
    socket.transport.abort()
    return True


async def vanishes(visitor: Visitor, socket: ClientConnection) -> bool:
    """Leaves without closing, as a machine that is switched off, for good: a new session
    follows."""
    socket.transport.abort()
    visitor.name = ""
    return True


async def garbage(visitor: Visitor, socket: ClientConnection) -> bool:
    """Sends bytes that are not a WebSocket frame: reserved bits are set."""
    socket.transport.write(bytes([0xF0 | visitor.rng.randrange(16)]) + visitor.rng.randbytes(63))
    await _closed(visitor, socket)
    return True


async def nonsense(visitor: Visitor, socket: ClientConnection) -> bool:
    """Sends messages that are not JSON, or not of the protocol."""
    texts = ("", "{", "null", '{"type": 7}', '{"type": "\\ud800"}', "[" * 1000, "\0" * 50)
    await socket.send(visitor.rng.choice(texts))
    await visitor.until(socket, "error")
    return False


async def large(visitor: Visitor, socket: ClientConnection) -> bool:
    """Sends a picture above the limit of its bytes."""
    await socket.send(bytes(visitor.frame_bytes + 1))
    await visitor.until(socket, "error")
    return False


async def huge(visitor: Visitor, socket: ClientConnection) -> bool:
    """Sends a message so large that the server does not read it."""
    with contextlib.suppress(ConnectionClosed):
        await socket.send(bytes(2 * visitor.frame_bytes + 1))
    await _closed(visitor, socket)
    return True


async def corrupt(visitor: Visitor, socket: ClientConnection) -> bool:
    """Sends a picture that is damaged behind a good beginning."""
    await socket.send(frame(0)[:100] + visitor.rng.randbytes(400))
    await visitor.until(socket, "error")
    return False


async def cancels(visitor: Visitor, socket: ClientConnection) -> bool:
    """Asks, and cancels the answer."""
    item = {"type": "message", "role": "user", "content": "Who is it?"}
    await visitor.send(socket, "conversation.item.create", item=item)
    await visitor.until(socket, "conversation.item.created")
    await visitor.send(socket, "response.cancel")
    return False


def _chat(visitor: Visitor) -> str:
    return f"http://{visitor.host}/v1/chat/completions"


def _clip(visitor: Visitor) -> dict[str, Any]:
    """A chat request about a file that is not a video."""
    data = b"\0\0\0\x18ftypisom" + visitor.rng.randbytes(2000)
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


async def asks_about_a_corrupt_clip(visitor: Visitor, _: ClientConnection) -> bool:
    answer = await visitor.http.post(_chat(visitor), json=_clip(visitor))
    if answer.status_code not in (400, 503):
        visitor.wrong.append(f"a corrupt clip: {answer.status_code} {answer.text[:200]}")
    return False


async def asks_and_leaves(visitor: Visitor, _: ClientConnection) -> bool:
    """Sends such a request, and leaves before the answer."""
    with contextlib.suppress(httpx.TimeoutException):
        await visitor.http.post(_chat(visitor), json=_clip(visitor), timeout=0.02)
    return False


async def knocks(visitor: Visitor, _: ClientConnection) -> bool:
    """Opens a connection that sends no HTTP."""
    host, port = visitor.host.split(":")
    writer = (await asyncio.open_connection(host, int(port)))[1]
    writer.write(visitor.rng.randbytes(200))
    writer.transport.abort()
    return False


async def _closed(visitor: Visitor, socket: ClientConnection) -> None:
    """Reads a socket to its end: the server must close it."""
    with contextlib.suppress(ConnectionClosed):
        await visitor.until(socket, "")


FAULTS: dict[str, Callable[[Visitor, ClientConnection], Awaitable[bool]]] = {
    "leaves and resumes": leaves,
    "is killed in a message": killed,
    "vanishes": vanishes,
    "bytes that are no frame": garbage,
    "text that is no message": nonsense,
    "picture over the limit": large,
    "message over the limit": huge,
    "corrupt picture": corrupt,
    "question, cancelled": cancels,
    "chat about a corrupt clip": asks_about_a_corrupt_clip,
    "chat, left": asks_and_leaves,
    "connection without HTTP": knocks,
}
