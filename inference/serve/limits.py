"""Limits on what a client may send and hold. docs/serving.md says where each is enforced."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from data_pipeline.fields import check_values, number
from inference.engine.sampling import SEEDS
from inference.session.events import writable


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    frame_bytes: int = number(4 * 2**20, above=0)
    body_bytes: int = number(64 * 2**20, above=0)  # of a chat request
    connections: int = number(1024, above=0)
    headers: float = number(10.0, above=0)  # how long the headers of a request may take to come
    body_wall: float = number(120.0, above=0)  # how long a chat request may take to come
    pixels: int = number(4096 * 4096, above=0)  # of a picture, or of each frame of a video
    picture_cpu: float = number(2.0, above=0)  # processor time of decoding a picture
    picture_wall: float = number(10.0, above=0)
    clip_cpu: float = number(60.0, above=0)  # likewise of a medium of a chat request
    clip_wall: float = number(120.0, above=0)
    decoders: int = number(2, above=0)  # processes for pictures of sessions; as many for chat
    media: int = number(32, above=0)  # that wait for a process
    memory: int = number(2**30, above=0)  # of decoding a medium
    sessions_memory: int = number(0, least=0, zero="what the places take")  # bytes of all sessions
    held: int = number(2**30, above=0)  # bytes of chat requests that are read or wait: all of them
    prompt_chars: int = number(8000, above=0)
    text_chars: int = number(2**18, above=0)  # of all messages of a chat request
    json_values: int = number(100_000, above=0)  # of a message or request, before it is parsed
    fps: float = number(8.0, above=0)  # frames a second of a session, on average
    frames: int = number(256, above=0)  # of a chat request
    max_tokens: int = number(4096, above=0)  # of a chat answer
    answers: int = number(8, above=0)  # to one chat request; no more than there are places
    replay: int = number(1024, above=0)  # past events that a client which comes back can get
    parked: int = number(8, above=0)  # sessions without a socket whose place others have taken
    grace: float = number(45.0, above=0)  # how long a session lives on without a socket
    idle: float = number(600.0, above=0)  # how long a session lives on without input
    send: float = number(10.0, above=0)  # how long a client may take to read an event
    step: float = number(60.0, above=0)  # of the engine, after which /health says that it is stuck
    silence: float = number(10.0, above=0)  # of a replica, after which it is taken for dead
    errors: int = number(32, above=0)  # wrong messages of a socket in a minute, after which it ends
    audit_bytes: int = number(64 * 2**20, above=0)  # of a file of the audit log
    audit_files: int = number(8, above=0)  # that are kept beside the one that is written
    waiting: int = number(64, above=0)  # chat requests that wait for a free place in the engine
    wait: float = number(60.0, above=0)  # how long a chat request waits

    def __post_init__(self) -> None:
        """Raises ValueError that names a limit out of range."""
        check_values(self)


# Least and largest value of a client's sampling settings.
SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (-1, 10**6),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.1, 10),
    "presence_penalty": (-2, 2),  # this and the next two as OpenAI's API has them
    "frequency_penalty": (-2, 2),
    "logit_bias": (-100, 100),
    "silence_bias": (-100, 100),
    "seed": SEEDS,
}


class Refused(Exception):
    """A request is refused. `code`: a short word; `field`: the part that is wrong; `retry`: seconds
    after which it may be asked again."""

    def __init__(
        self, code: str, message: str, field: str | None = None, retry: float | None = None
    ) -> None:
        super().__init__(writable(message))
        self.code, self.field, self.retry = code, writable(field), retry


class Budget:
    """Bytes that all requests together may hold. Any thread may call it."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self.lock = threading.RLock()

    @property
    def held(self) -> int:
        return self._held

    def share(self) -> Share:
        """A request's part of it, empty so far."""
        return Share(self)

    def change(self, size: int) -> None:
        """Takes bytes, or gives them back; Refused(`overloaded`) where there are not so many."""
        with self.lock:
            if size > 0 and self._held + size > self._most:
                raise Refused("overloaded", "the requests of others take all memory")
            self._held += size


class Share:
    """What one request holds of a Budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self._size, self._over = budget, 0, False

    def take(self, size: int) -> None:
        """Refused: `overloaded`, where there is no room; the request is over."""
        with self._budget.lock:
            if self._over:  # a decoder's thread hears of it late
                raise Refused("failed", "the request is over")
            self._budget.change(size)
            self._size += size

    def give_back(self) -> None:
        """All of it. Calling it twice is not an error."""
        with self._budget.lock:
            self._budget.change(-self._size)
            self._size, self._over = 0, True


class Bucket:
    """Lets through `rate` per second on average, and up to `burst` at once (default: 2 s')."""

    def __init__(self, rate: float, burst: float | None = None) -> None:
        self._rate, self._burst = rate, burst or 2 * rate
        self._left, self._at = self._burst, 0.0

    def take(self, now: float, count: int = 1) -> bool:
        """Whether so many more may pass."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < count:
            return False
        self._left -= count
        return True
