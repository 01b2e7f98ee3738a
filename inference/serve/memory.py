"""What each session may hold, known before it is let in, and a ceiling for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inference.engine.cache_sizes import gib
from inference.engine.engine import Engine, EngineFull
from inference.session.session import SessionConfig

FLAG = "--limit_sessions_memory"


@dataclass(frozen=True)
class SessionMemory:
    """Bytes of one session at most: keys and values of its text and of its frames; pictures as the
    model sees them, uint8 [3, tile, tile] each, which wait in its queue."""

    text: int
    frames: int
    pixels: int

    @classmethod
    def of(cls, engine: Engine, tile: int) -> SessionMemory:
        """Memory of one of the server's sessions; with several ranks, what one of them holds."""
        sizes = engine.cache.sizes
        waiting = SessionConfig().max_waiting_frames
        return cls(sizes.text, sizes.frames, (waiting + 1) * picture(tile))

    def check(self, most: int) -> None:
        """ValueError where not even one session fits into so many bytes (0: no ceiling)."""
        if most and self.total > most:
            raise ValueError(
                f"{FLAG} {most}: a session needs {self.total} bytes (text {self.text}, frames "
                f"{self.frames}, pictures {self.pixels}): give more, or a smaller --max_context "
                "or --window"
            )

    @property
    def kept(self) -> int:
        """Keys and values: what an answer takes, whose pictures count with its request."""
        return self.text + self.frames

    @property
    def total(self) -> int:
        return self.kept + self.pixels


def picture(tile: int) -> int:
    """Bytes of one picture."""
    return 3 * tile * tile


def parked_size(state: Mapping[str, Any] | None) -> int:
    """Bytes of the context of a session without a place, on the CPU."""
    return sum(part.nbytes for part in (state or {}).values() if isinstance(part, Tensor))


class Ceiling:
    """The bytes that all sessions of a process may hold together; in its event loop.

    Args:
        most: of all. 0: no ceiling.
        where: is named in errors.
    """

    def __init__(self, most: int, where: str = FLAG) -> None:
        self.most, self._where = most, where
        self._held: dict[object, int] = {}

    @property
    def held(self) -> int:
        return sum(self._held.values())

    def lacks(self, size: int, holder: object = None) -> str:
        """Why so many bytes, in place of what the holder has, do not fit; empty: they do."""
        free = self.most - self.held + self._held.get(holder, 0)
        if not self.most or size <= free:
            return ""
        return (
            f"{gib(size)} are needed, and {gib(max(0, free))} of the {gib(self.most)} for all "
            f"sessions are free ({self._where})"
        )

    def check(self, size: int, holder: object = None) -> None:
        """EngineFull where so many bytes do not fit."""
        wrong = self.lacks(size, holder)
        if wrong:
            raise EngineFull(f"no memory for one more session: {wrong}")

    @contextlib.contextmanager
    def promised(self, size: int, holder: object = None) -> Iterator[None]:
        """So many bytes, in place of what the holder has, are kept from others while somebody waits
        for what will have them; EngineFull."""
        self.check(size, holder)
        promise = object()
        self.take(promise, size - self._held.get(holder, 0))
        try:
            yield
        finally:
            self.give_back(promise)

    def take(self, holder: object, size: int) -> None:
        """The holder has so many bytes from now on."""
        self._held[holder] = size

    def give_back(self, holder: object) -> None:
        """All of it. Calling it twice is not an error."""
        self._held.pop(holder, None)
