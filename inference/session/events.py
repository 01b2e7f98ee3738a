"""A session's events, numbered, in a bounded log that any number of readers follow."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

LOG_LIMIT = 65536  # events that a log keeps
_HALVES = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can spell one, UTF-8 cannot


@dataclass(frozen=True)
class Event:
    """One event. `t_server`: seconds since the epoch, by its log's clock; `t_media`: seconds of the
    newest frame that the model has seen. `type` is a name of OpenAI's Realtime API where there is
    one.
    """

    type: str
    seq: int
    t_server: float
    t_media: float
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        head = {"type": self.type, "seq": self.seq}
        return {**head, "t_server": self.t_server, "t_media": self.t_media, **self.data}


def writable(value: Any) -> Any:
    """A value as JSON can hold it: half characters become U+FFFD, numbers beyond 64 bits None, and
    what JSON does not know its text."""
    if isinstance(value, str):
        return value if value.isascii() else _HALVES.sub("\ufffd", value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {writable(str(name)): writable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [writable(one) for one in value]
    return writable(str(value))


class EventLog:
    """The last `limit` events of a session, numbered from 1; ends with `close`.

    zero: what the log's clock (`now`) says, less `time.monotonic()`. It is set when the log is
    made: a machine's clock may be set back or ahead at any time.

    One thread appends, others read. A reader that is more than `limit` events behind gets an
    `error` event with the code `events_lost` and the numbers of the missing events.
    """

    def __init__(self, limit: int = LOG_LIMIT) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()
        self._ends: list[Callable[[], None]] = []
        self.last_seq = 0
        self.closed = False
        self.zero = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since the epoch, by the log's clock."""
        return self.zero + time.monotonic()

    def append(self, type: str, t_media: float, data: dict[str, Any]) -> Event:
        data = writable(data)  # an event that no reader can write would stop each of them
        with self._changed:
            self.last_seq += 1
            event = Event(type, self.last_seq, self.now(), t_media, data)
            self._events.append(event)
            self._wake()
        return event

    def put(self, event: Event) -> None:
        """An event of another log, with its number, which goes on from the last one here."""
        with self._changed:
            self.last_seq = event.seq
            self._events.append(event)
            self._wake()

    def close(self) -> None:
        """No more events: readers end after the last one."""
        with self._changed:
            ends, self._ends = self._ends, []
            self.closed = True
            self._wake()
        for end in ends:
            end()

    def when_closed(self, end: Callable[[], None]) -> None:
        """Calls `end` when the log is closed, in the event loop of the caller."""
        loop = asyncio.get_running_loop()

        def later() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(end)

        with self._changed:
            if not self.closed:
                self._ends.append(later)
                return
        later()

    def after(self, seq: int, limit: int = 256) -> list[Event]:
        """Up to `limit` events after number `seq`; before them `events_lost`, if some are gone."""
        with self._changed:
            missing = self.last_seq - seq
            if missing <= 0:
                return []
            kept = len(self._events)
            first = max(0, kept - missing)
            events = [self._events[i] for i in range(first, min(kept, first + limit))]
            if missing > kept:
                lost = {"code": "events_lost", "from_seq": seq + 1, "to_seq": events[0].seq - 1}
                lost["message"] = f"events {seq + 1} to {events[0].seq - 1} are no longer kept"
                now = events[0]
                events.insert(0, Event("error", now.seq - 1, now.t_server, now.t_media, lost))
            return events

    def wait_closed(self, seconds: float) -> bool:
        """Waits up to `seconds` until the log is closed; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.closed, max(0.0, seconds))

    def follow(self, seq: int = 0, session: object = None) -> Iterator[Event]:
        """Waits for events after number `seq` and yields them until the log is closed. session:
        whose log it is, which somebody else may forget while they are read."""
        while not (self.closed and self.last_seq <= seq):
            with self._changed:
                while self.last_seq <= seq and not self.closed:
                    self._changed.wait()
            for event in self.after(seq):
                seq = event.seq
                yield event

    async def wait(self, seq: int) -> None:
        """Waits in an event loop until there is an event after number `seq`, or the end."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def waker() -> None:
            with contextlib.suppress(RuntimeError):  # the waiter's event loop is closed
                loop.call_soon_threadsafe(ready.set)

        with self._changed:
            if self.last_seq > seq or self.closed:
                return
            self._wakers.add(waker)
        try:
            await ready.wait()
        finally:
            with self._changed:
                self._wakers.discard(waker)

    async def afollow(self, seq: int = 0, session: object = None) -> AsyncIterator[Event]:
        """As `follow`, in an event loop."""
        while not (self.closed and self.last_seq <= seq):
            await self.wait(seq)
            for event in self.after(seq):
                seq = event.seq
                yield event

    def _wake(self) -> None:
        self._changed.notify_all()
        for waker in self._wakers:
            waker()
