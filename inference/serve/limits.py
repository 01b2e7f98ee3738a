"""Limits on what a client may send and hold. docs/streaming.md says where each is enforced."""

from __future__ import annotations

from dataclasses import dataclass

from inference.engine.sampling import SEEDS


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    frame_bytes: int = 4 * 2**20
    body_bytes: int = 64 * 2**20  # of a chat request
    pixels: int = 3840 * 2160  # of a picture, read from its header
    prompt_chars: int = 8000
    fps: float = 8.0  # frames a second of a session, on average
    frames: int = 256  # of a chat request
    max_tokens: int = 4096  # of a chat answer
    replay: int = 1024  # past events that a client which comes back can get
    grace: float = 45.0  # how long a session lives on without a socket
    idle: float = 600.0  # how long a session lives on without input
    send: float = 10.0  # how long a client may take to read an event
    errors: int = 32  # wrong messages of one socket, after which it is closed
    waiting: int = 64  # chat requests that wait for a free place in the engine
    wait: float = 60.0  # how long a chat request waits


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
