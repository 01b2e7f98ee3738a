"""What a client may do. Everything that comes from the network is held to one of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    frame_bytes: int = 4 * 2**20
    body_bytes: int = 64 * 2**20  # of a chat request
    pixels: int = 3840 * 2160  # of a picture, known before it is decoded
    prompt_chars: int = 8000
    fps: float = 8.0  # frames a second of a session, on average
    frames: int = 256  # of a chat request
    max_tokens: int = 4096  # of a chat answer
    replay: int = 1024  # events that a client which comes back can still get
    grace: float = 45.0  # that a session lives on without a socket
    idle: float = 600.0  # that it lives on without input
    send: float = 10.0  # that a client may take to read what was sent
    errors: int = 32  # of one socket, after which it is closed
    waiting: int = 64  # chat requests that wait for a free session
    wait: float = 60.0  # how long they do


# Least and largest value of a client's sampling settings.
SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "top_k": (0, 10**6),
    "top_p": (1e-6, 1),
    "repetition_penalty": (0.1, 10),
    "silence_bias": (-100, 100),
    "seed": (0, 2**53),
}


class Refused(Exception):
    """A request that is refused. `code` is a short word, `field` what of the request is wrong."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.field = code, field


class Bucket:
    """Lets `rate` a second through on average, and twice as many at once."""

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
