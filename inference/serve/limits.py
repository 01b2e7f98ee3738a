"""Limits on what a client may send and hold. docs/streaming.md says where each is enforced."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.fields import check_values, number
from inference.engine.sampling import SEEDS


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    frame_bytes: int = number(4 * 2**20, above=0)
    body_bytes: int = number(64 * 2**20, above=0)  # of a chat request
    pixels: int = number(3840 * 2160, above=0)  # of a picture, read from its header
    prompt_chars: int = number(8000, above=0)
    fps: float = number(8.0, above=0)  # frames a second of a session, on average
    frames: int = number(256, above=0)  # of a chat request
    max_tokens: int = number(4096, above=0)  # of a chat answer
    replay: int = number(1024, above=0)  # past events that a client which comes back can get
    grace: float = number(45.0, above=0)  # how long a session lives on without a socket
    idle: float = number(600.0, above=0)  # how long a session lives on without input
    send: float = number(10.0, above=0)  # how long a client may take to read an event
    errors: int = number(32, above=0)  # wrong messages of one socket, after which it is closed
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
    "repetition_penalty": (0.1, 10),
    "silence_bias": (-100, 100),
    "seed": SEEDS,
}


class Refused(Exception):
    """A request is refused. `code`: a short word; `field`: the part that is wrong."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.field = code, field


class Bucket:
    """Lets through `rate` per second on average, and up to twice as many at once."""

    def __init__(self, rate: float) -> None:
        self._rate, self._left, self._at = rate, 2 * rate, 0.0

    def take(self, now: float) -> bool:
        """Whether one more may pass."""
        self._left = min(2 * self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
