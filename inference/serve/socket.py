"""One WebSocket: reads messages into its session, and writes the session's events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from starlette.websockets import WebSocket

from data_pipeline.schema import SampleError
from inference.serve.accounts import LIMITED
from inference.serve.hub import Hub, LiveSession
from inference.serve.limits import Bucket, Refused
from inference.serve.messages import Cancel, CreateItem, ImageAppend, SessionUpdate
from inference.serve.protocol import (
    ImageMessage,
    parse,
    read_image,
    read_item,
    read_update,
    refused_update,
)
from inference.serve.session_socket import POLICY, SessionSocket
from inference.session.handle import SessionClosed
from inference.session.session import PromptTooLong, QueueFull

log = logging.getLogger(__name__)

_LARGE = 2**16  # characters of a message
_ENDED = "no input is taken after input_image_buffer.end"
Result = TypeVar("Result")


class Connection(SessionSocket):
    """A client's socket."""

    def __init__(self, hub: Hub, live: LiveSession, socket: WebSocket, last_seq: int) -> None:
        super().__init__(live, socket, last_seq, hub.limits)
        self._hub, self._live, self._session = hub, live, live.handle
        self._announced: ImageMessage | None = None  # second and prompt of the next binary message
        self._bucket = Bucket(hub.limits.fps)
        self._skipped = 0  # frames over the rate that are not reported yet
        self._errors = Bucket(hub.limits.errors / 60, hub.limits.errors)
        self._too_many = False  # errors
        self._number, self._age = 0, 0.0  # of the message; seconds since it came

    def _left(self) -> None:
        self._emit_skipped(0.0)
        if self._live.untouched and self._live.socket is None:  # no other one has taken it
            self._live.close("its client left before any input")
        if self._live.untouched or self._done:
            self._hub.forget(self._live)

    def _slow(self) -> None:
        self._hub.metrics.refused("slow_client")

    def _change(self) -> AbstractContextManager[None]:
        """Called around everything that a message changes, after everything that it waits for."""
        return self._session.change()

    async def _take(self, text: str | None, data: bytes | None) -> bool:
        """Handles a message; False: it was the last one."""
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
            await self.close(POLICY, "too many wrong messages")
            return False
        return True

    def _emit_error(self, code: str, message: str, field: str | None = None) -> None:
        # These may be nobody's fault: what was said has just ended, the queue is that of a moment,
        # other sessions of its key have asked.
        if code not in ("nothing_to_cancel", "queue_full", LIMITED):
            self._too_many = not self._errors.take(time.monotonic())
        with self._change():
            self._session.emit("error", code=code, message=message, field=field)

    async def _command(self, text: str) -> None:
        session, limits = self._session, self._hub.limits
        message = await _off_loop(len(text), parse, text, limits)
        kind = message.type
        if session.input_ended and isinstance(message, ImageAppend | CreateItem):
            raise Refused("wrong_order", _ENDED)
        if self._announced and kind in ("input_image_buffer.append", "input_image_buffer.end"):
            self._announced = None
            raise Refused("wrong_order", "the picture of the append before has not come")
        if isinstance(message, ImageAppend):
            image = await _off_loop(len(text), read_image, message, limits)
            if image.data is not None:
                return await self._frame(image.data, image)
            self._announced = image
        elif isinstance(message, CreateItem):
            words, picture = await _off_loop(len(text), read_item, message, limits)
            if picture is not None:
                return await self._frame(picture, ImageMessage(picture, None, words))
            self._refuse_over()
            session.check(words)
            with self._change():
                session.prompt(words)
                self._live.untouched = False
        else:
            if isinstance(message, SessionUpdate):
                session.check(message.session.instructions or "", message.session.prompt or "")
            with self._change():
                self._control(message)

    def _control(self, message: Any) -> None:
        """Handles a message that brings no input."""
        session, kind = self._session, message.type
        if isinstance(message, SessionUpdate):
            try:
                session.configure(**read_update(message, session.config.sampling))
            except ValueError as error:
                raise error if isinstance(error, PromptTooLong) else refused_update(error) from None
            session.emit("session.updated", session=self._hub.describe(self._live))
        elif isinstance(message, Cancel):
            if not session.cancel(message.response_id):
                raise Refused("nothing_to_cancel", "no response is being said")
        elif kind == "input_image_buffer.end":
            self._emit_skipped(0.0)
            session.end()
        elif kind == "session.close":
            self._emit_skipped(0.0)
            self._done = True
            session.close("closed by the client")

    async def _frame(self, data: bytes, image: ImageMessage) -> None:
        """Checks a picture, decodes it outside of the event loop, queues it."""
        limits, session, arrived = self._hub.limits, self._session, time.monotonic() - self._age
        if session.input_ended:
            raise Refused("wrong_order", _ENDED)
        at = self._second(image, arrived)
        if at is not None and at < self._live.newest:
            words = f"ts: {at} is before the last frame, {self._live.newest}"
            raise Refused("invalid_value", words, "ts")
        loose = session.config.live and not image.prompt
        if not loose:
            self._refuse_over()
        while self._over or not self._bucket.take(time.monotonic()):
            if loose:
                with self._change():
                    self._skipped += 1
                return
            await asyncio.sleep(1 / limits.fps)
        if len(data) > limits.frame_bytes:
            raise Refused("too_large", f"{len(data)} bytes are more than {limits.frame_bytes}")
        session.check(image.prompt or "")
        picture = await self._hub.decode(data)
        if not session.config.live:
            await session.room()
        with self._change():
            self._emit_skipped(at or 0.0)
            self._live.untouched = False
            self._live.newest = session.push_frame(picture, at, image.prompt, self._number)
            if image.at is not None:
                self._live.clock.set(image.at, arrived)

    def _refuse_over(self) -> None:
        if self._over:
            raise Refused(LIMITED, self._over)

    def _emit_skipped(self, at: float) -> None:
        if self._skipped and not self._session.log.closed:
            self._session.drop("rate_limited", at, self._skipped)
            self._skipped = 0

    def _second(self, image: ImageMessage, arrived: float) -> float | None:
        """The frame's second: the client's; without one, of a live source, the time of arrival."""
        if image.at is None and self._session.config.live:
            return round(self._live.clock.second(None, arrived), 3)
        return image.at


async def _off_loop(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Reads a message; a large one in a thread, so that others are served meanwhile."""
    if size < _LARGE:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)
