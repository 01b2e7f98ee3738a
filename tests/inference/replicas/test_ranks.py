"""A replica of two ranks, which is restarted, and of which one is killed; servers of other
machines; the end of a front.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from data_pipeline.commands import FAILED
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.access import Access
from inference.serve.limits import Limits
from inference.session.runner import Runner
from tests.inference.replicas.test_replicas import ENGINE, SEATS, answered, gone, start
from tests.inference.serve.serving import Running, serving
from tests.waiting import PATIENCE, until
from tools.bench import replicas as bench
from tools.bench.replicas import Drill


def ranks_of(launcher: int) -> dict[str, psutil.Process]:
    """Those that a process has started, by what torchrun calls them."""
    children = psutil.Process(launcher).children()
    return {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}


def serves(drill: Drill) -> dict[str, int]:
    """Sessions of each replica that is ready, by address."""
    return {r["address"]: r["sessions"] for r in drill.replicas() if r["state"] == "ready"}


@dataclass
class Fleet:
    """A front with a replica of two ranks, and two servers of this process behind it.

    remote: those, by their addresses. errors: what the front and its replica write.
    """

    process: subprocess.Popen[bytes]
    drill: Drill
    remote: dict[str, Running]
    errors: Path

    def others(self, action: str) -> None:
        """Drains those of this process, or takes them into service again."""
        for number in (1, 2):
            httpx.post(
                f"http://{self.drill.host}/admin/replicas/{number}/{action}", timeout=PATIENCE
            )

    def pair(self) -> dict[str, Any]:
        """The replica of two ranks."""
        return self.drill.replicas()[0]

    def ended(self) -> list[str]:
        """What is said of ranks that have ended: whole lines."""
        lines = self.errors.read_text().splitlines(keepends=True)
        return [line for line in lines if line.startswith("replica 0: rank") and "\n" in line]


def made(tiny: Path, max_sessions: int) -> Engine:
    return load_engine(
        tiny, device="cpu", window=512, max_tokens=8192, max_sessions=max_sessions
    )  # nothing is dropped


@pytest.fixture(scope="module")
def fleet(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    errors = tmp_path_factory.mktemp("fleet") / "errors"
    with contextlib.ExitStack() as stack:
        remote = {}
        for _ in range(2):
            access, limits = Access(front_key="k"), Limits(decoders=1)
            running = stack.enter_context(serving(made(tiny, SEATS), limits, access=access))
            remote[running.http] = running
        flags = ["--replicas", "1", "--gpus_per_replica", "2", "--replica_urls", ",".join(remote)]
        flags += ["--window", "512", "--max_context", "8192"]
        process, drill = start(tiny, *flags, "--front_key", "k", said=errors)
        stack.callback(process.wait)
        stack.callback(process.kill)
        drill.wait_ready(3)
        yield Fleet(process, drill, remote, errors)


def test_a_replica_of_ranks_is_restarted_under_its_sessions(fleet: Fleet, tiny: Path) -> None:
    """They go on elsewhere, and with the new ranks when those they have gone to are drained, word
    for word; an answer that is being said is said to its end."""
    old = fleet.pair()
    ranks = ranks_of(old["pid"])
    assert len(ranks) == 2

    def hit(clients: list[bench.Client]) -> None:
        until(lambda: min(client.frames for client in clients) >= 3)
        assert fleet.pair()["sessions"] == 2
        with ThreadPoolExecutor(1) as pool:
            answer = answering(fleet, pool)
            fleet.others("resume")
            admin = f"http://{fleet.drill.host}/admin/restart"
            assert httpx.post(admin, timeout=PATIENCE).status_code == 202
            assert httpx.post(admin, timeout=PATIENCE).status_code == 503  # it is under way
            until(lambda: all(c.count("session.resumed") for c in clients))
            for client in clients:
                client.interval = 2.0  # the start takes its time, and no frame may be dropped
            assert answer.result().json()["usage"]["completion_tokens"] == 200
        assert gone(list(ranks.values()))
        until(lambda: fleet.pair()["pid"] not in (None, old["pid"]))
        fleet.drill.wait_ready(3)
        moved = [client.count("session.resumed") for client in clients]
        fleet.others("drain")
        until(
            lambda: all(c.count("session.resumed") > n for c, n in zip(clients, moved, strict=True))
        )
        seen = [client.frames for client in clients]
        until(lambda: all(c.frames > n for c, n in zip(clients, seen, strict=True)))
        until(lambda: fleet.pair()["sessions"] == 2)  # they may have gone to it by way of another
        fleet.others("resume")

    fleet.others("drain")
    clients = asyncio.run(play(fleet.drill, hit))
    assert [client.gaps for client in clients] == [0, 0]
    with Runner(made(tiny, 1)) as runner:
        assert bench.differing(clients, runner) == []
    assert fleet.ended() == []  # none has failed


def test_a_rank_that_is_killed_ends_its_replica_and_no_session(fleet: Fleet, tiny: Path) -> None:
    """Its sessions go on at a server that this process has, and at another one when that ends,
    word for word. No process outlives a front that is killed."""
    drill, remote = fleet.drill, fleet.remote
    first_url = next(iter(remote))
    assert httpx.get(f"{first_url}/v1/models").status_code == 401  # the front alone
    pair = fleet.pair()
    ranks = ranks_of(pair["pid"])
    assert len(ranks) == 2

    def hit(clients: list[bench.Client]) -> None:
        """Kills a rank, then ends a server that has gone on with its sessions."""
        until(lambda: min(client.frames for client in clients) >= 3)
        assert fleet.pair()["sessions"] == 2
        fleet.others("resume")
        ranks["1"].kill()
        until(lambda: all(client.count("session.resumed") for client in clients))
        assert gone(list(ranks.values()))
        seen = [client.frames for client in clients]
        until(lambda: all(c.frames > n for c, n in zip(clients, seen, strict=True)))
        serving_now = serves(drill)
        first = max(remote, key=lambda url: serving_now.get(url, 0))
        seen = [client.frames for client in clients]
        all_moves = serving_now[first] + sum(c.count("session.resumed") for c in clients)
        remote[first].server.should_exit = True
        until(lambda: sum(c.count("session.resumed") for c in clients) >= all_moves)
        until(lambda: all(c.frames > n for c, n in zip(clients, seen, strict=True)))

    fleet.others("drain")
    clients = asyncio.run(play(drill, hit))
    assert [client.gaps for client in clients] == [0, 0]
    with Runner(made(tiny, 1)) as runner:
        assert bench.differing(clients, runner) == []
    until(lambda: fleet.pair()["pid"] not in (None, pair["pid"]))  # its launcher has ended
    (said,) = fleet.ended()
    pid = ranks["1"].pid
    assert said.startswith(f"replica 0: rank 1 (process {pid}) ended (SIGKILL)")
    drill.wait_ready(2)  # it was started again
    assert answered(drill).json()["usage"]["completion_tokens"] <= 3
    found = psutil.Process(fleet.process.pid).children(recursive=True)
    fleet.process.kill()
    fleet.process.wait()
    assert gone(found)


def test_the_rank_that_was_killed_is_named_however_late_its_launcher_looks(
    tiny: Path, tmp_path: Path
) -> None:
    """When all of them have ended."""
    said, flags = tmp_path / "said", ["--checkpoint", str(tiny), *ENGINE, "--limit_decoders", "1"]
    command = [sys.executable, "-m", "inference.replicas.ranks", "0", "2", str(tmp_path)]
    command += [*flags, "--unix_socket", str(tmp_path / "socket")]
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(said.open("wb"))
        launcher = stack.enter_context(subprocess.Popen(command, stderr=errors))
        stack.callback(launcher.kill)
        until(lambda: launcher.poll() is not None or "unix:" in said.read_text())
        ranks = ranks_of(launcher.pid)
        launcher.send_signal(signal.SIGSTOP)
        ranks["1"].kill()
        until(lambda: {rank.status() for rank in ranks.values()} == {psutil.STATUS_ZOMBIE})
        launcher.send_signal(signal.SIGCONT)
        assert launcher.wait(PATIENCE) == FAILED
    words = f"rank 1 (process {ranks['1'].pid}) ended (SIGKILL), and with it the other ranks"
    assert said.read_text().splitlines()[-1] == f"replica 0: {words}"


def answering(fleet: Fleet, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """An answer that the replica of two ranks has begun."""
    while True:
        answer = pool.submit(answered, fleet.drill, max_tokens=200, ignore_eos=True)
        until(lambda: answer.done() or fleet.pair()["chats"] == 1)  # noqa: B023
        if not answer.done():
            return answer
        answer.result().raise_for_status()  # it was over before anybody looked


async def play(drill: Drill, hit: Callable[[list[bench.Client]], None]) -> list[bench.Client]:
    """Two clients, until they have been hit."""
    clients = [bench.Client(number, drill.url, interval=0.1) for number in range(2)]
    hits = asyncio.create_task(asyncio.to_thread(hit, clients))
    done = await asyncio.gather(*(client.run(lambda _: hits.done()) for client in clients))
    await hits
    return done
