"""One WebSocket: reads messages into its session, and writes the session's events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.websockets import WebSocket, WebSocketDisconnect

from data_pipeline.schema import SampleError
from inference.serve.hub import FAILED, POLICY, REPLACED, Hub, LiveSession
from inference.serve.limits import Bucket, Refused
from inference.serve.messages import Cancel, CreateItem, ImageAppend, SessionUpdate
from inference.serve.protocol import ImageMessage, parse, read_image, read_item, read_update
from inference.serve.realtime_events import as_message
from inference.session.handle import SessionClosed
from inference.session.session import PromptTooLong, QueueFull

log = logging.getLogger(__name__)

_LARGE = 2**16  # characters of a message
Result = TypeVar("Result")


class Connection:
    """A socket that holds a session, until the socket closes or the session ends."""

    def __init__(self, hub: Hub, live: LiveSession, socket: WebSocket, last_seq: int) -> None:
        self._hub, self._live, self._socket, self._seq = hub, live, socket, last_seq
        self._session = live.handle
        self._announced: ImageMessage | None = None  # second and prompt of the next binary message
        self._bucket = Bucket(hub.limits.fps)
        self._skipped = 0  # frames over the rate that are not reported yet
        self._errors = Bucket(hub.limits.errors / 60, hub.limits.errors)
        self._too_many = False  # errors
        self._done = False  # the session's end was sent, or the client asked for it

    async def run(self) -> None:
        """Serves the socket until it closes; the session may live on."""
        replaced = self._live.attach(self)
        tasks = [asyncio.create_task(work) for work in (self._read(), self._write())]
        gone = asyncio.create_task(replaced.wait())
        try:
            await asyncio.wait([*tasks, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not any(task.done() for task in tasks):
                await self._close(REPLACED, "another connection has taken the session")
        finally:
            for task in (*tasks, gone):
                task.cancel()
            await asyncio.gather(*tasks, gone, return_exceptions=True)
            self._emit_skipped(0.0)
            self._live.detach(self)
            if self._live.untouched:
                self._live.close("its client left before any input")
            if self._live.untouched or self._done:
                self._hub.forget(self._live)

    async def _write(self) -> None:
        """Sends events until the log ends. Gives up a client that does not read."""
        limits = self._hub.limits
        try:
            async for event in self._session.log.afollow(self._seq):
                text = json.dumps(as_message(event), ensure_ascii=False)
                await asyncio.wait_for(self._socket.send_text(text), limits.send)
        except TimeoutError:
            self._hub.metrics.refused("slow_client")
            return  # a close message would not get through either
        self._done = True
        code = FAILED if self._session.failed else self._live.close_code
        await self._close(code, self._session.reason or "the session is over")

    async def _read(self) -> None:
        try:
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                if not await self._take(message.get("text"), message.get("bytes")):
                    return
        except (WebSocketDisconnect, RuntimeError):  # starlette raises it for a closed socket
            return

    async def _take(self, text: str | None, data: bytes | None) -> bool:
        """Handles one message; False: it was the last."""
        self._live.last_input = time.monotonic()
        try:
            if data is not None:
                announced, self._announced = self._announced, None
                await self._frame(data, announced or ImageMessage(None, None, None))
            else:
                await self._command(text or "")
        except Refused as error:
            self._emit_error(error.code, str(error), error.field)
        except SampleError as error:
            self._emit_error(error.reason, error.detail)
        except QueueFull as error:
            self._emit_error("queue_full", str(error))
        except PromptTooLong as error:
            self._emit_error("context_length_exceeded", str(error))
        except ValueError as error:
            self._emit_error("invalid_value", str(error))
        except SessionClosed:
            return True  # the writer sends the event
        except Exception as error:  # a fault of ours: the client hears of it, its session lives
            log.exception("a message of %s", self._session.name)
            self._emit_error("failed", f"the server failed: {type(error).__name__}")
        if self._too_many:
            self._hub.metrics.refused("protocol_errors")
            await self._close(POLICY, "too many wrong messages")
            return False
        return True

    def _emit_error(self, code: str, message: str, field: str | None = None) -> None:
        # Both may be nobody's fault: what was said has just ended, the queue is that of a moment.
        if code not in ("nothing_to_cancel", "queue_full"):
            self._too_many = not self._errors.take(time.monotonic())
        self._session.emit("error", code=code, message=message, field=field)

    async def _command(self, text: str) -> None:
        session, limits = self._session, self._hub.limits
        message = await _off_loop(len(text), parse, text, limits)
        kind = message.type
        if kind in ("session.close", "input_image_buffer.end"):
            self._emit_skipped(0.0)
        if self._announced and kind in ("input_image_buffer.append", "input_image_buffer.end"):
            self._announced = None
            raise Refused("wrong_order", "the picture of the append before has not come")
        if isinstance(message, SessionUpdate):
            session.configure(**read_update(message, session.config.sampling))
            session.emit("session.updated", session=self._hub.describe(self._live))
        elif isinstance(message, ImageAppend):
            image = await _off_loop(len(text), read_image, message, limits)
            if image.data is None:
                self._announced = image
            else:
                await self._frame(image.data, image)
        elif isinstance(message, CreateItem):
            words, picture = await _off_loop(len(text), read_item, message, limits)
            if picture is None:
                session.prompt(words)
                self._live.untouched = False
            else:
                await self._frame(picture, ImageMessage(picture, None, words))
        elif isinstance(message, Cancel):
            if not session.cancel(message.response_id):
                raise Refused("nothing_to_cancel", "no response is being said")
        elif kind == "input_image_buffer.end":
            session.end()
        elif kind == "session.close":
            self._done = True
            session.close("closed by the client")

    async def _frame(self, data: bytes, image: ImageMessage) -> None:
        """Checks a picture, decodes it outside of the event loop, queues it."""
        limits, session, arrived = self._hub.limits, self._session, time.monotonic()
        at = self._second(image, arrived)
        if at is not None and at < self._live.newest:
            words = f"ts: {at:g} is before the last frame, {self._live.newest:g}"
            raise Refused("invalid_value", words, "ts")
        while not self._bucket.take(time.monotonic()):
            if session.config.live and not image.prompt:
                self._skipped += 1
                return
            await asyncio.sleep(1 / limits.fps)
        self._emit_skipped(at or 0.0)
        if len(data) > limits.frame_bytes:
            raise Refused("too_large", f"{len(data)} bytes are more than {limits.frame_bytes}")
        picture = await self._hub.decode(data)
        self._live.untouched = False
        if session.config.live:
            session.push_frame(picture, at, image.prompt)
        else:
            await session.aput_frame(picture, at, image.prompt)
        if at is not None:
            self._live.newest = at
        if image.at is not None:
            self._live.clock.set(image.at, arrived)

    def _emit_skipped(self, at: float) -> None:
        if self._skipped and not self._session.log.closed:
            self._session.drop("rate_limited", at, self._skipped)
            self._skipped = 0

    def _second(self, image: ImageMessage, arrived: float) -> float | None:
        """The frame's second: what the client says; else, of a live source, when it arrived."""
        if image.at is None and self._session.config.live:
            return round(self._live.clock.second(None, arrived), 3)
        return image.at

    async def _close(self, code: int, reason: str) -> None:
        try:
            await asyncio.wait_for(self._socket.close(code, cut(reason)), 1.0)
        except (RuntimeError, TimeoutError, WebSocketDisconnect):
            return  # it is closed already, or its client does not read


def cut(reason: str) -> str:
    """As much as a close frame holds: 123 bytes."""
    return reason.encode("utf-8", "replace")[:123].decode("utf-8", "ignore")


async def _off_loop(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """The result of reading a message; of a large one in a thread, for others are served here."""
    if size < _LARGE:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
