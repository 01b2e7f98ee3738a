"""The front: all sessions by id, the replicas that serve them, and who is moved where and when."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import Response
from starlette.websockets import WebSocket

from data_pipeline import devices
from inference.export_info import ExportInfo
from inference.replicas.client import ClientSocket
from inference.replicas.metrics import FrontMetrics
from inference.replicas.places import Places
from inference.replicas.processes import Process
from inference.replicas.proxy import Proxy
from inference.replicas.replica import Replica
from inference.replicas.session import UNTAKEN_BYTES, FrontSession
from inference.serve.accounts import Account, Visit
from inference.serve.app import refuse
from inference.serve.hub import new_id
from inference.serve.limits import Limits
from inference.serve.memory import Ceiling
from inference.serve.session_socket import GOING_AWAY, NORMAL, TRY_LATER, UNKNOWN, refusal_to_resume
from inference.serve.wire import code as own_code

log = logging.getLogger(__name__)

_LOOK, _SOON = 1.0, 0.1  # seconds between looks at a replica, and at one that starts
_SETTLE = 5.0  # seconds: a session should be back by then
_CHATS = 60.0  # seconds for which a replica that is restarted finishes its chat requests


class Front:
    """What the routes serve where there are replicas.

    Args:
        processes: of those replicas that the front starts itself.
        each: bytes of a session's pictures that the front keeps at most.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        processes: Sequence[Process],
        limits: Limits,
        export: ExportInfo,
        each: int,
    ) -> None:
        self.replicas, self.processes = list(replicas), list(processes)
        self.limits, self.export = limits, export
        self.metrics = FrontMetrics()
        self.refused = self.metrics.refused
        self.each = each + UNTAKEN_BYTES
        self.memory = Ceiling(
            limits.sessions_memory or devices.free_memory(torch.device("cpu")) // 2
        )
        self.places = Places(self.replicas, self._make_room)
        self.sessions: dict[str, FrontSession] = {}
        self.closing = self.restarting = False
        self.failed = ""  # why no replica will ever serve; empty: one may
        self._served = False  # a replica has been ready
        self._proxy = Proxy(self.places, limits)
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self) -> None:
        """ValueError where not even one session may be kept."""
        wrong = self.memory.lacks(self.each)
        if wrong:
            raise ValueError(f"pictures and messages of a session, kept at the front: {wrong}")

    # Service

    async def health(self) -> dict[str, Any]:
        ready = sum(replica.state == "ready" for replica in self.replicas)
        status = "closing" if self.closing else "ok" if ready else "no_replica"
        return {
            "status": status,
            "replicas": len(self.replicas),
            "replicas_ready": ready,
            "sessions": len(self.sessions),
            "waiting": self.places.waiting,
            "max_sessions": sum(r.seats for r in self.replicas if r.state == "ready"),
        }

    async def metrics_page(self) -> bytes:
        return await self.metrics.page(
            self.replicas,
            sessions=len(self.sessions),
            waiting=self.places.waiting,
            kept_bytes=sum(session.size for session in self.sessions.values()),
            held_bytes=self.memory.held,
            ceiling_bytes=self.memory.most,
        )

    async def complete(self, request: Request, visit: Visit) -> Response:
        return await self._proxy.complete(request, visit)

    async def realtime(
        self, socket: WebSocket, account: Account, name: str | None, last_seq: int
    ) -> None:
        session = None if name is None else self.sessions.get(name)
        if self.closing:
            words = "the server is shutting down"
            return await refuse(socket, self, GOING_AWAY, "closing", words)
        wrong = "" if name is None else refusal_to_resume(session, account, last_seq)
        if wrong:
            return await refuse(socket, self, UNKNOWN, "unknown_session", wrong)
        if session is None:
            visit = account.enter("realtime", socket.headers)
            if self.places.waiting >= self.limits.waiting:
                words = f"{self.places.waiting} sessions wait for a place"
                return await refuse(socket, self, TRY_LATER, "full", words, visit)
            wrong = self._make_memory()
            if wrong:
                return await refuse(socket, self, TRY_LATER, "memory", wrong, visit)
            session = FrontSession(self, new_id())
            session.begin(visit)
            self.sessions[session.id] = session
            self.memory.take(session.log, self.each)
            session.log.when_closed(partial(self.memory.give_back, session.log))
        session.wake()
        await ClientSocket(session, socket, last_seq, self.limits).run()

    # Served

    decodes = True  # its replicas do

    def start(self) -> None:
        """Starts the replicas, in the event loop, and looks after them."""
        for process in self.processes:
            self._spawn(process.run(self._exited, self._settled))
        for replica in self.replicas:
            own = next((p for p in self.processes if p.replica is replica), None)
            self._spawn(self._watch(replica, own))
        self._spawn(self._reap())

    async def close(self) -> None:
        """Ends all sessions, then the replicas."""
        self.closing = True
        reason = "the server is shutting down"
        sessions = list(self.sessions.values())
        await asyncio.gather(*(session.close(reason, GOING_AWAY) for session in sessions))
        await asyncio.gather(*(process.stop() for process in self.processes))
        for task in list(self._tasks):
            task.cancel()
        for replica in self.replicas:
            await replica.http.aclose()

    # Home of sessions

    def passed(self, session: FrontSession, type: str, data: dict[str, Any]) -> None:
        if type == "session.resumed":
            self.metrics.resumed(data["reason"], session.away)

    def forget(self, session: FrontSession) -> None:
        if self.sessions.get(session.id) is session:
            del self.sessions[session.id]

    def _make_room(self, count: int) -> bool:
        """Frees places of sessions whose clients are away, longest first; returns whether so many
        become free."""
        having = [s for s in self.sessions.values() if s.socket is None and s.replica is not None]
        leaving = sum(session.leaving for session in having)
        away = sorted((s for s in having if not s.leaving), key=_left_at)
        for session in away[: max(0, count - leaving)]:
            session.sleep()
        return leaving + len(away) >= count

    def _make_memory(self) -> str:
        """Ends sessions whose clients are away, longest first, where one more could not be kept;
        returns why it still cannot, or ""."""
        away = sorted((s for s in self.sessions.values() if s.socket is None), key=_left_at)
        for session in away:
            if not self.memory.lacks(self.each):
                break
            session.finish(NORMAL, "others needed its memory")
            self.memory.give_back(session.log)
            self.forget(session)
        return self.memory.lacks(self.each)

    # Replicas

    async def _watch(self, replica: Replica, process: Process | None) -> None:
        """Follows a replica's health, for as long as the front lives."""
        while True:
            if process is None or process.running:
                starts = process.starts if process is not None else 0
                status = await replica.look(self.limits.silence)
                # A process that has ended meanwhile has answered for itself, not for the next one.
                if process is None or (process.running and process.starts == starts):
                    self._set_status(replica, process, status)
            await asyncio.sleep(_LOOK if replica.state == "ready" else _SOON)

    def _set_status(self, replica: Replica, process: Process | None, status: str) -> None:
        if status == "ok":
            if replica.state in ("starting", "dead"):
                log.warning("replica %d is ready", replica.number)
                if replica.code != own_code():
                    log.warning(
                        "replica %d, %s, runs another version than this front: they may not "
                        "understand each other: start both from the same one",
                        replica.number, replica.address,
                    )  # fmt: skip
                replica.state = "ready"
                replica.served = self._served = True
            self.places.pump()
            return
        if status == "starting":  # or its only decoder is being replaced
            return
        quiet = time.monotonic() - replica.last_answer_at > self.limits.silence
        if replica.serves and (status != "silent" or quiet):
            log.warning("replica %d is lost: %s", replica.number, status)
            self._lose(replica)
            if process is not None and status in ("silent", "stuck"):
                process.end(signal.SIGKILL)

    def _lose(self, replica: Replica) -> None:
        """Takes a replica out of service: its sessions go on elsewhere."""
        if replica.state == "dead":
            return
        replica.lose()
        self.metrics.ended(replica)
        for session in list(replica.sessions):
            session.move("replica_lost")
        self.places.pump()

    def _exited(self, process: Process, code: int) -> None:
        replica = process.replica
        if not (self._served or self.closing):
            words = "see what it has written above"
            self.failed = f"replica {replica.number} ended ({code}) before it was ready: {words}"
        self._lose(replica)

    async def _settled(self) -> None:
        """Waits, a few seconds at most, until others have computed anew the sessions of a replica
        that has ended: on few cores its next start takes the time that they need. Not where one
        has no seat, which that start gives it."""
        until = time.monotonic() + _SETTLE
        while time.monotonic() < until and not self.places.waiting:
            if not any(session.rebuilding for session in self.sessions.values()):
                break
            await asyncio.sleep(_SOON)

    async def drain(self, replica: Replica) -> None:
        """Moves its sessions to others, and waits for its chat requests."""
        for session in list(replica.sessions):
            session.move("moved")
        until = time.monotonic() + _CHATS
        while (replica.chats or replica.sessions) and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def restart(self) -> bool:
        """Begins to restart the front's own replicas one by one; False: it does so already."""
        if self.restarting:
            return False
        self.restarting = True
        self._spawn(self._restart())
        return True

    async def _restart(self) -> None:
        try:
            for process in self.processes:
                replica, starts = process.replica, process.starts
                if replica.state == "ready":
                    replica.state = "draining"
                    await self.drain(replica)
                process.restart()
                while process.starts == starts or replica.state != "ready":
                    await asyncio.sleep(_SOON)
        finally:
            self.restarting = False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reap(self) -> None:
        """Ends sessions whose clients do not come back, for as long as the front lives."""
        grace = self.limits.grace
        while True:
            await asyncio.sleep(min(1.0, grace / 4))
            now = time.monotonic()
            for session in list(self.sessions.values()):
                if session.socket is None and now - session.detached_at > grace:
                    self.forget(session)
                    self._spawn(session.close(f"nobody came back within {grace:g} s", NORMAL))


def _left_at(session: FrontSession) -> float:
    """When a session's client left."""
    return session.detached_at
