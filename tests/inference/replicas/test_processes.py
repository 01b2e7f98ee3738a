"""When a replica that has ended is started again."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference.export_info import ExportInfo
from inference.replicas import front as front_module
from inference.replicas.front import Front
from inference.replicas.processes import Process
from inference.replicas.replica import Replica
from inference.serve.limits import Limits


def test_it_starts_again_when_its_sessions_have_settled_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        replica = Replica(0, f"unix:{tmp_path / 'socket'}", "key")
        process = Process(replica, [sys.executable, "-c", "raise SystemExit(7)"], {})
        settled, ends = asyncio.Event(), list[int]()

        async def wait() -> None:
            await settled.wait()

        replica.state = "ready"  # of its last life
        task = asyncio.create_task(process.run(lambda _, code: ends.append(code), wait))
        while not ends:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.5)  # longer than the wait after a first failure
        assert (process.starts, ends) == (1, [7])
        settled.set()
        while len(ends) < 2:
            await asyncio.sleep(0.05)
        assert process.starts == 2
        await process.stop()
        task.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 300))


def test_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that are computed anew, unless one waits for a seat."""
    monkeypatch.setattr(front_module, "_SETTLE", 1000.0)  # else it gives up in a while

    async def scenario() -> None:
        replica = Replica(0, "http://127.0.0.1:1", "key")
        front = Front([replica], [], Limits(), ExportInfo("realtime", "realtime_sft"), 2**20)
        await front._settled()
        session: Any = SimpleNamespace(rebuilding=True)
        front.sessions["one"] = session
        settled = asyncio.create_task(front._settled())
        await asyncio.sleep(0.5)  # in which it looks
        assert not settled.done()
        session.rebuilding = False
        await settled
        session.rebuilding = True
        tenant: Any = SimpleNamespace(started=True, requested_at=0.0, queued=lambda *_: None)
        waits = asyncio.create_task(front.places.take(tenant))
        await asyncio.sleep(0)
        assert front.places.waiting == 1
        await front._settled()
        waits.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 300))
