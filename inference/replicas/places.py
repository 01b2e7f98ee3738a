"""Which replica a session gets, and who waits for one.

Sessions that have lost their replica go before new ones, each in the order in which they asked; one
whose replica has no seat after all keeps its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence

from inference.replicas.replica import Replica, Tenant

_REMEMBERED = 600.0  # seconds of seats that became free, for the estimate
_LEAST_MEMORY = 2**28  # bytes: a replica with less is the last choice


class Places:
    """The seats of all replicas. make_room: frees so many seats, where clients are away; whether
    it can."""

    def __init__(self, replicas: Sequence[Replica], make_room: Callable[[int], bool]) -> None:
        self.replicas, self._make_room = replicas, make_room
        self._queue: list[tuple[Tenant, asyncio.Future[Replica]]] = []
        self._freed: deque[float] = deque(maxlen=256)
        self._began = time.monotonic()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def take(self, session: Tenant) -> Replica:
        """Waits for a seat; it is held until `release`."""
        future: asyncio.Future[Replica] = asyncio.get_running_loop().create_future()
        self._queue.append((session, future))
        self._queue.sort(key=lambda one: (not one[0].started, one[0].requested_at))
        self.pump()
        try:
            return await future
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._queue.remove((session, future))
            if future.done() and not future.cancelled():
                self.release(session, future.result())
            raise

    def release(self, session: Tenant, replica: Replica) -> None:
        """Gives a seat back."""
        replica.sessions.discard(session)
        self._freed.append(time.monotonic())
        self.pump()

    def pump(self) -> None:
        """Gives free seats to those who wait, and tells the others where they stand."""
        while self._queue:
            replica = self.best()
            if replica is None:
                break
            session, future = self._queue.pop(0)
            if not future.done():
                replica.sessions.add(session)
                future.set_result(replica)
        if self._queue and not self._make_room(len(self._queue)):
            reason = "full" if any(r.state == "ready" for r in self.replicas) else "no_replica"
            for number, (session, _) in enumerate(self._queue, 1):
                session.queued(number, self._estimate(number), reason)

    def best(self) -> Replica | None:
        """The replica with the most free seats; of several, the one with the most memory."""
        free = [replica for replica in self.replicas if replica.free > 0]
        return max(free, key=lambda r: (r.memory > _LEAST_MEMORY, r.free, r.memory), default=None)

    def for_chat(self, tried: Sequence[Replica]) -> Replica | None:
        """The replica for a chat request, none of those that were asked: with a free seat, or else
        the one with the fewest requests, which waits there in its queue."""
        ready = [r for r in self.replicas if r.state == "ready" and not r.held and r not in tried]
        if ready and not any(r.free for r in ready):
            self._make_room(1)
        return max(ready, key=lambda r: (r.free, -r.chats / max(1, r.seats)), default=None)

    def _estimate(self, position: int) -> float | None:
        now = time.monotonic()
        freed = sum(1 for at in self._freed if now - at < _REMEMBERED)
        if not freed:
            return None
        return round(position * min(_REMEMBERED, now - self._began) / freed, 1)
