"""A speaker that is a server of ours, or a front of several, in sessions over its WebSocket."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import PIL.Image
from torch import Tensor
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from inference.evaluate.harness.server import base_of, check_weights, weights_at
from inference.evaluate.results import BenchmarkError
from inference.evaluate.streaming.items import Emission, Item
from inference.evaluate.streaming.speaker import (
    ResponseCollector,
    SpeakerFailed,
    SpeakingConfig,
    Watching,
)
from inference.session.events import Event
from inference.session.handle import SessionClosed
from inference.session.runner import INPUT_ENDED

_CONNECT = 10.0  # seconds for an answer of /health
_PATIENCE = 600.0  # seconds without an event after which a session counts as ended
_AHEAD = 8  # frames that may be sent before the server has taken in the first of them
_SILENT = 100.0  # bias of <|silence|> with which the model never speaks
_END = "end"  # why a session is over: the input's end
_HEAD = ("type", "seq", "t_server", "t_media")  # fields that every event has


def check_server(url: str) -> str:
    """What the server says of its weights (`weights_at`). Raises BenchmarkError where no server
    answers, or its model has not learned to watch."""
    try:
        form = httpx.get(f"{base_of(url)}/health", timeout=_CONNECT).json().get("prompt_form")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError) as error:
        raise BenchmarkError(f"{url}: no server of ours answers there: {error}") from None
    if form not in (None, "realtime"):
        raise BenchmarkError(f"{url}: has not learned to watch: serve a real-time model")
    return weights_at(base_of(url))


class RemoteSpeaker:
    """A speaker at `http(s)://HOST:PORT`. `key`: the server's API key, or empty. `weights`: what
    `check_server` said; a server that says something else fails all items. Empty: any."""

    def __init__(self, url: str, config: SpeakingConfig, key: str = "", weights: str = "") -> None:
        self._base = base_of(url)
        self._url = self._base.replace("http", "ws", 1) + "/v1/realtime"
        self._config, self._key, self._weights = config, key, weights

    def watch(self, item: Item) -> AbstractContextManager[Watching]:
        return self._session(item.start, self._config)

    def answer(self, item: Item, question: str, frames: Iterable[Tensor], at: float) -> str:
        """The answer to a question about a clip, which the model watches in silence before."""
        quiet = replace(self._config, clock="media", silence_bias=_SILENT)
        with self._session(0.0, quiet) as remote:
            for number, frame in enumerate(frames):
                remote.frame(number / quiet.fps, frame)
            return remote.answer(question)

    @contextmanager
    def _session(self, start: float, config: SpeakingConfig) -> Iterator[_Remote]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            check_weights(self._base, self._weights)
            socket = connect(self._url, additional_headers=headers, max_size=None, proxy=None)
        except BenchmarkError as error:
            raise SpeakerFailed(str(error), fatal=True) from None
        except (OSError, WebSocketException) as error:
            raise SpeakerFailed(f"{self._url}: {error}", fatal=True) from None
        try:
            with socket, _Remote(socket, start, config) as remote:
                yield remote
        except (OSError, WebSocketException, SessionClosed) as error:
            raise SpeakerFailed(f"{self._url}: {error}", fatal=False) from None


class _Remote:
    """A stream that the server's model watches in a session.

    On the media clock the server takes in frames, and questions that come with them, in their
    order, whenever they arrive. A question without a frame is sent only when all frames before it
    have been taken in and the model has said to them what the pace allows.
    """

    def __init__(self, socket: ClientConnection, start: float, config: SpeakingConfig) -> None:
        self._socket, self._wall = socket, config.clock == "wall"
        self._responses = ResponseCollector(
            start, self._wall, time.monotonic
        )  # the server's clock is another one
        self._changed = threading.Condition()
        self._sent = self._processed = self._items = 0
        self._state = "silent"  # or `speaking`, also while it decides; or `waiting`
        self._over, self._latest = "", time.monotonic()
        self._reader = threading.Thread(target=self._read, name="moss-hear", daemon=True)
        self._send(
            "session.update",
            session={
                "source": "live" if self._wall else "file",
                "pace": config.pace,
                "frame_interval": 1 / config.fps,
                "max_output_tokens": config.max_new_tokens,
                "silence_bias": config.silence_bias,
                "instructions": config.system_prompt,
            },
        )

    def __enter__(self) -> _Remote:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._reader.join()

    def ask(self, second: float, text: str) -> None:
        if self._wall:
            time.sleep(self._responses.seconds_until(second))
        else:
            self._settle()
        self._ask(second, text)
        if not self._wall:
            self._settle()

    def answer(self, question: str) -> str:
        """The answer, without a bias of `<|silence|>`, to a question after all frames."""
        self._settle()
        self._send("session.update", session={"silence_bias": 0.0})
        self._ask(0.0, question)
        return "".join(emission.text for emission in self.end() if emission.turn)

    def _ask(self, second: float, text: str) -> None:
        self._responses.turn_seconds.append(second)
        content = [{"type": "input_text", "text": text}]
        self._send("conversation.item.create", item={"content": content})

    def frame(self, second: float, picture: Tensor, question: str | None = None) -> None:
        self._responses.note_frame(second, question)
        if self._wall:
            time.sleep(self._responses.seconds_until(second))
        else:
            self._wait(lambda: self._sent - self._processed < _AHEAD)
        with self._changed:
            self._sent += 1
        self._send(
            "input_image_buffer.append", ts=second, **({"prompt": question} if question else {})
        )
        self._socket.send(png(picture))

    def emissions(self) -> list[Emission]:
        if not self._wall:
            self._settle()
        with self._changed:
            return self._responses.emissions()

    def end(self) -> list[Emission]:
        self._send("input_image_buffer.end")
        with self._changed:
            while not self._over:
                if not self._changed.wait(_PATIENCE):
                    raise SessionClosed(f"no event for {_PATIENCE:g} s")
            if self._over != _END:
                raise SessionClosed(self._over)
            return self._responses.emissions()

    def _settle(self) -> None:
        """Waits, on the media clock, until the server has taken in all input, and the model is
        silent or has said what the pace allows."""
        self._wait(
            lambda: (
                self._processed >= self._sent
                and self._items >= len(self._responses.turn_seconds)
                and self._state != "speaking"
            )
        )

    def _wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            while not done():
                if self._over:
                    raise SessionClosed(self._over)
                self._changed.wait(_PATIENCE)
                if time.monotonic() - self._latest > _PATIENCE:
                    raise SessionClosed(f"no event for {_PATIENCE:g} s")

    def _send(self, kind: str, **fields: Any) -> None:
        self._socket.send(json.dumps({"type": kind, **fields}))

    def _read(self) -> None:
        over = "what the server sends cannot be read"  # which its thread prints
        try:
            for text in self._socket:
                with self._changed:
                    self._take(json.loads(text))
                    self._latest = time.monotonic()
                    self._changed.notify_all()
            over = "the server has closed the connection"
        except (OSError, ValueError, WebSocketException, SessionClosed) as error:
            over = str(error)
        finally:
            with self._changed:
                self._over = self._over or over
                self._changed.notify_all()

    def _take(self, data: dict[str, Any]) -> None:
        kind, seq, _, t_media = (data.pop(name, 0) for name in _HEAD)
        self._responses.add(Event(kind, seq, time.monotonic(), t_media, data))
        self._processed += kind in ("input_frame.processed", "input_frame.dropped")
        self._items += kind == "conversation.item.created"
        if kind == "session.state":
            self._state = str(data.get("state"))
        elif kind == "conversation.item.created" or (
            # A frame that ends a response, or is spoken to, is followed by a state.
            kind == "input_frame.processed"
            and (data.get("decision") == "speech" or self._state != "silent")
        ):
            self._state = "speaking"
        if kind == "session.closed":
            reason = str(data.get("reason"))
            self._over = _END if reason == INPUT_ENDED else reason


def png(picture: Tensor) -> bytes:
    """A picture, uint8 [3, H, W], as a PNG file."""
    file = io.BytesIO()
    PIL.Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()
