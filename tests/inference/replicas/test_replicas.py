"""A front and its replicas, real processes and sockets: what is killed, moved or restarted is not
missed by any client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from websockets.sync.client import connect

from inference.engine.load import load_engine
from inference.serve.__main__ import main
from inference.session.runner import Runner
from tests.inference.serve.serving import Client, jpeg
from tools.bench import replicas as bench
from tools.bench.replicas import Drill

SEATS = 4  # of a replica
ENGINE = ["--device", "cpu", "--window", "64", "--max_context", "2048"]
CONFIG: dict[str, Any] = {"source": "file", "pace": 4, "silence_bias": 4.0, "max_output_tokens": 9}

# On two cores, which the rest of the suite uses too, their time limits are met now and then only.
four_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 4, reason="a front, two models and a client want four cores"
)


def start(tiny: Path, *args: str) -> tuple[subprocess.Popen[bytes], Drill]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    front = [*ENGINE, "--max_sessions", str(SEATS), "--limit_decoders", "1", "--port", str(port)]
    command = [sys.executable, "-m", "inference.serve", "--checkpoint", str(tiny), *front, *args]
    return subprocess.Popen(command), Drill(f"127.0.0.1:{port}")


@pytest.fixture(scope="module")
def front(tiny: Path) -> Iterator[Drill]:
    process, drill = start(tiny, "--replicas", "2")
    try:
        drill.wait_ready(2)
        yield drill
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 2
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert gone(children)


def gone(children: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(children, timeout=20)[1]


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "front" in request.fixturenames:
        drill = request.getfixturevalue("front")
        drill.wait_ready(2)
        until = time.monotonic() + 10
        while any(replica["sessions"] or replica["chats"] for replica in drill.replicas()):
            assert time.monotonic() < until, drill.replicas()
            time.sleep(0.05)


def open_client(drill: Drill, query: str = "") -> Client:
    return Client(connect(f"{drill.url}{query}", max_size=None, open_timeout=60))


def begin(drill: Drill) -> Client:
    client = open_client(drill)
    client.until("session.created")
    client.update(**CONFIG)
    return client


def show(client: Client, second: int, prompt: str | None = None) -> None:
    client.frame(jpeg(second), ts=float(second), prompt=prompt)


def decided(client: Client, second: int) -> None:
    client.until("input_frame.processed", frame_at=float(second))


def replica_of(drill: Drill) -> dict[str, Any]:
    """That of the only session."""
    (found,) = (replica for replica in drill.replicas() if replica["sessions"])
    return found


def numbers(*clients: Client) -> list[int]:
    return [event["seq"] for client in clients for event in client.seen]


def test_killed_replicas_lose_no_word(front: Drill, tiny: Path) -> None:
    """Against the same frames in one process without a server. Between the second kill and the
    start of the first replica's next process there is none."""

    async def play() -> list[bench.Client]:
        clients = [bench.Client(number, front.url) for number in range(SEATS)]
        running = [asyncio.create_task(c.run(lambda frames: frames == 12)) for c in clients]
        for frames in (4, 8):
            while min(client.frames for client in clients) < frames:
                await asyncio.sleep(0.01)
            await front.kill(least=1)
        return await asyncio.gather(*running)

    clients = asyncio.run(play())
    assert [kill.sessions > 0 for kill in front.kills] == [True, True]
    assert 2 <= sum(client.count("session.resumed") for client in clients) <= 2 * SEATS
    assert [client.gaps for client in clients] == [0] * SEATS
    engine = load_engine(tiny, device="cpu", window=64, max_tokens=2048, max_sessions=1)
    with Runner(engine) as runner:
        assert bench.differing(clients, runner) == []


def test_a_client_and_its_replica_go_at_the_same_time(front: Drill) -> None:
    with begin(front) as first:
        for second in range(3):
            show(first, second)
        decided(first, 1)
        os.kill(replica_of(front)["pid"], signal.SIGKILL)
    name = first.seen[0]["session"]["id"]
    with open_client(front, f"?session={name}&last_seq={first.seen[-1]['seq']}") as again:
        show(again, 3)
        decided(again, 2)
        decided(again, 3)
        again.send("session.close")
        again.rest()
    assert [e["type"] for e in again.seen].count("session.resumed") == 1
    assert numbers(first, again) == list(range(1, len(numbers(first, again)) + 1))
    assert again.close_code == 1000


@four_cores
def test_replicas_are_restarted_one_by_one_under_a_session(front: Drill) -> None:
    pids = {replica["pid"] for replica in front.replicas()}
    with begin(front) as client:
        show(client, 0)
        decided(client, 0)
        answer = httpx.post(f"http://{front.host}/admin/restart")
        assert answer.status_code == 202
        second = 0
        while pids & {r["pid"] for r in front.replicas()} or second < 3:
            second += 1
            show(client, second, "Who is it?" if second == 2 else None)
            decided(client, second)
        front.wait_ready(2)
        client.send("session.close")
        client.rest()
    assert numbers(client) == list(range(1, len(client.seen) + 1))
    reasons = [e["reason"] for e in client.seen if e["type"] == "session.resumed"]
    assert set(reasons) == {"moved"}


@four_cores
def test_who_finds_no_seat_is_told_where_it_stands(front: Drill) -> None:
    first = [begin(front) for _ in range(2 * SEATS)]
    for client in first:
        show(client, 0)
        decided(client, 0)
    assert [replica["sessions"] for replica in front.replicas()] == [SEATS, SEATS]
    with open_client(front) as late, open_client(front) as later:
        queued = late.until("session.queued")
        assert (queued["position"], queued["reason"]) == (1, "full")
        assert later.until("session.queued")["position"] == 2
        late.update(**CONFIG)  # waits with its client
        show(late, 0)
        first[0].send("session.close")
        assert first[0].close_code == 1000
        decided(late, 0)
        assert later.until("session.queued", position=1)["estimate_s"] > 0
        first[1].socket.close()  # a client that is away gives its place
        later.until("session.created")
        assert numbers(later) == [1, 2, 3]
        for client in (*first[2:], late, later):
            client.send("session.close")
            client.rest()
    name = first[1].seen[0]["session"]["id"]
    with open_client(front, f"?session={name}&last_seq={first[1].seen[-1]['seq']}") as again:
        assert again.until("session.resumed")["reason"] == "away"
        show(again, 1)
        decided(again, 1)
        again.send("session.close")
        again.rest()


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "A"}], "max_tokens": 3, **fields}


@four_cores
def test_chat_requests_outlive_a_replica(front: Drill) -> None:
    url = f"http://{front.host}/v1/chat/completions"
    whole = httpx.post(url, json=ask(), timeout=60).json()
    assert whole["usage"]["completion_tokens"] <= 3
    wrong = httpx.post(url, json=ask(temprature=1), timeout=60)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["code"] == "unknown_field"
    long = ask(max_tokens=900, ignore_eos=True)
    with (
        httpx.Client(timeout=60) as http,
        http.stream("POST", url, json={**long, "stream": True}) as s,
    ):
        lines = s.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        (serving,) = (replica for replica in front.replicas() if replica["chats"])
        os.kill(serving["pid"], signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "replica_lost"
    front.wait_ready(2)

    async def killed() -> httpx.Response:
        async with httpx.AsyncClient(timeout=60) as http:
            asked = asyncio.create_task(http.post(url, json=long))
            while not (busy := [r for r in await asyncio.to_thread(front.replicas) if r["chats"]]):
                await asyncio.sleep(0.01)
            os.kill(busy[0]["pid"], signal.SIGKILL)
            return await asked

    answer = asyncio.run(killed())
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 900


@four_cores
def test_the_front_sums_what_its_replicas_count(front: Drill) -> None:
    health = httpx.get(f"http://{front.host}/health").json()
    assert (health["status"], health["replicas_ready"]) == ("ok", 2)
    assert health["max_sessions"] == 2 * SEATS

    def frames() -> float:
        page = httpx.get(f"http://{front.host}/metrics").text
        (line,) = (one for one in page.splitlines() if one.startswith("moss_frames_total "))
        return float(line.split()[1])

    before = frames()
    with begin(front) as client:
        for second in range(3):
            show(client, second)
            decided(client, second)
        assert frames() == before + 3
        os.kill(replica_of(front)["pid"], signal.SIGKILL)
        client.until("session.resumed")
        show(client, 3)
        decided(client, 3)
        assert frames() == before + 4
        client.send("session.close")
        client.rest()


def test_no_process_outlives_a_front_that_is_killed(tiny: Path) -> None:
    process, _ = start(tiny, "--replicas", "2")
    try:
        until = time.monotonic() + 60
        while not (found := psutil.Process(process.pid).children(recursive=True)):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert gone(found)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replicas", "2", "--unix_socket", "x"], "--unix_socket"),
        (["--replica_urls", "http://a:1"], "--front_key"),
        (["--replica_urls", "a:1"], "http://HOST:PORT"),
        (["--replica_urls", "http://a:1,http://a:1/"], "named twice"),
        (["--replicas", "2", "--window", "4", "--sinks", "9"], "sinks=9"),
        (["--replicas", "-1"], "--replicas"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(
    flags: list[str], words: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(tiny), "--device", "cpu", "--port", "0", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
