"""A front and its replicas, real processes and sockets: what is killed, moved or restarted is not
missed by any client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from websockets.sync.client import connect

from data_pipeline import devices
from inference.cli import CommandError
from inference.engine.load import load_engine
from inference.replicas.command import check
from inference.replicas.metrics import WAIT
from inference.replicas.processes import Process, command
from inference.replicas.replica import Replica
from inference.serve.__main__ import main
from inference.serve.flags import parse
from inference.session.runner import Runner
from tests.inference.serve.serving import CHAT, Client, jpeg
from tests.waiting import PATIENCE, until
from tools.bench import replicas as bench
from tools.bench.replicas import Drill

SEATS = 4  # of a replica
ENGINE = ["--device", "cpu", "--window", "64", "--max_context", "2048"]
CONFIG: dict[str, Any] = {"source": "file", "pace": 4, "silence_bias": 4.0, "max_output_tokens": 9}

BEHIND = re.compile(r" replicas behind http://([\d.:]+)/\n")  # what a front says of itself


def start(tiny: Path, *args: str, said: Path) -> tuple[subprocess.Popen[bytes], Drill]:
    """A front, at a port that the system gives it. said: a file for what all of it writes."""
    front = [*ENGINE, "--max_sessions", str(SEATS), "--limit_decoders", "1", "--port", "0"]
    command = [sys.executable, "-m", "inference.serve", "--checkpoint", str(tiny), *front, *args]
    with said.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors)
    until(lambda: process.poll() is not None or BEHIND.search(said.read_text()) is not None)
    address = BEHIND.search(said.read_text())
    assert address, said.read_text()
    return process, Drill(address[1])


@pytest.fixture(scope="module")
def front(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    said = tmp_path_factory.mktemp("front") / "said"
    # One that a busy machine does not let answer for long is not dead.
    process, drill = start(tiny, "--replicas", "2", "--limit_silence", "120", said=said)
    try:
        drill.wait_ready(2)
        yield drill
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 2
    finally:
        process.terminate()
        print(said.read_text())  # where something has failed pytest shows it
        assert process.wait(PATIENCE) == 0
    assert gone(children)


def gone(children: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(children, timeout=PATIENCE)[1]


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "front" in request.fixturenames:
        drill = request.getfixturevalue("front")
        drill.wait_ready(2)
        until(lambda: not any(r["sessions"] or r["chats"] for r in drill.replicas()))


def open_client(drill: Drill, query: str = "") -> Client:
    url = f"{drill.url}{query}"
    return Client(connect(url, max_size=None, open_timeout=PATIENCE, ping_interval=None))


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


def resumed(client: Client) -> list[str]:
    """Why it has gone on elsewhere, each time."""
    return [event["reason"] for event in client.seen if event["type"] == "session.resumed"]


def test_killed_replicas_lose_no_word(front: Drill, tiny: Path) -> None:
    """Against the same frames in one process without a server. Between the second kill and the
    start of the first replica's next process there is none."""

    async def play() -> list[bench.Client]:
        clients = [bench.Client(number, front.url, interval=0.05) for number in range(SEATS)]
        killed = asyncio.Event()  # before that no client ends

        def ends(frames: int) -> bool:
            return frames >= 12 and killed.is_set()

        running = [asyncio.create_task(client.run(ends)) for client in clients]
        for frames in (4, 8):
            while min(client.frames for client in clients) < frames:
                assert not any(client.done() for client in running)
                await asyncio.sleep(0.01)
            await front.kill(least=1)
        killed.set()
        return await asyncio.gather(*running)

    clients = asyncio.run(play())
    assert [kill.sessions > 0 for kill in front.kills] == [True, True]
    assert 2 <= sum(client.count("session.resumed") for client in clients) <= 2 * SEATS
    assert [client.gaps for client in clients] == [0] * SEATS
    engine = load_engine(tiny, device="cpu", window=64, max_tokens=2048, max_sessions=1)
    with Runner(engine) as runner:
        assert bench.differing(clients, runner) == []


def test_replicas_are_restarted_one_by_one_under_a_session(front: Drill) -> None:
    pids = {replica["pid"] for replica in front.replicas()}
    with begin(front) as client:
        show(client, 0)
        decided(client, 0)
        moves = 2 - replica_of(front)["replica"]  # it leaves each one whose turn comes
        answer = httpx.post(f"http://{front.host}/admin/restart", timeout=PATIENCE)
        assert answer.status_code == 202
        for second in range(1, moves + 1):
            while len(resumed(client)) < second:  # it may have moved twice while a frame waited
                client.next()
            show(client, second, "Who is it?")
            decided(client, second)
        until(lambda: not pids & {replica["pid"] for replica in front.replicas()})
        front.wait_ready(2)
        client.send("session.close")
        client.rest()
    assert numbers(client) == list(range(1, len(client.seen) + 1))
    assert resumed(client) == ["moved"] * moves


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


def answered(drill: Drill, **fields: Any) -> httpx.Response:
    return httpx.post(f"http://{drill.host}{CHAT}", json=ask(**fields), timeout=PATIENCE)


def test_chat_requests_are_passed_on(front: Drill) -> None:
    assert answered(front).json()["usage"]["completion_tokens"] <= 3
    wrong = answered(front, temprature=1)
    assert wrong.status_code == 400
    assert wrong.json()["error"]["code"] == "unknown_field"


def frames(drill: Drill) -> float:
    """That all replicas have counted: a page that the front has waited for may lack some."""
    took = WAIT
    while took >= WAIT:
        began = time.monotonic()
        page = httpx.get(f"http://{drill.host}/metrics", timeout=PATIENCE).text
        took = time.monotonic() - began
    (line,) = (one for one in page.splitlines() if one.startswith("moss_frames_total "))
    return float(line.split()[1])


def test_what_a_killed_replica_does_goes_on_elsewhere(front: Drill) -> None:
    """A session; one whose client goes at the same time; an answer. A stream that has begun ends;
    what the replica has counted stays in the sum."""
    health = httpx.get(f"http://{front.host}/health", timeout=PATIENCE).json()
    assert (health["status"], health["replicas_ready"]) == ("ok", 2)
    assert health["max_sessions"] == 2 * SEATS
    url, before = f"http://{front.host}/admin/replicas/1", frames(front)
    assert httpx.post(f"{url}/drain", timeout=PATIENCE).json()["state"] == "held"
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.Client(timeout=PATIENCE) as http,
        begin(front) as stays,
        begin(front) as goes,
    ):
        for client in (stays, goes):
            for second in range(3):
                show(client, second)
                decided(client, second)
        assert frames(front) == before + 6
        victim: int = front.replicas()[0]["pid"]
        longest = ask(max_tokens=1900, ignore_eos=True, stream=True)  # of a context of 2,048
        with http.stream("POST", f"http://{front.host}{CHAT}", json=longest) as streamed:
            lines = streamed.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["choices"]
            os.kill(victim, signal.SIGSTOP)  # neither answer ends before it is killed
            whole = pool.submit(answered, front, max_tokens=500, ignore_eos=True)
            until(lambda: whole.done() or front.replicas()[0]["chats"] == 2)
            assert not whole.done()
            httpx.post(f"{url}/resume", timeout=PATIENCE)
            os.kill(victim, signal.SIGKILL)
            goes.socket.close()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "replica_lost"
        assert stays.until("session.resumed")["reason"] == "replica_lost"
        name = goes.seen[0]["session"]["id"]
        again = open_client(front, f"?session={name}&last_seq={goes.seen[-1]['seq']}")
        for client in (stays, again):
            show(client, 3)
            decided(client, 3)
            client.send("session.close")
            client.rest()
            assert client.close_code == 1000
        assert numbers(stays) == list(range(1, len(stays.seen) + 1))
        assert numbers(goes, again) == list(range(1, len(goes.seen + again.seen) + 1))
        assert len(resumed(again)) == 1
        assert whole.result().json()["usage"]["completion_tokens"] == 500
        until(lambda: frames(front) >= before + 8)
        assert frames(front) == before + 8


GPUS = ["4", "5", "6", "7"]


def test_each_replica_sees_its_own_gpus(tmp_path: Path) -> None:
    """Of those that the front may see: what a child of it says."""
    shares = [devices.only("cuda", GPUS[:2]), devices.only("cuda", GPUS[2:])]

    async def say(number: int) -> None:
        ended = asyncio.get_running_loop().create_future()
        replica = Replica(number, f"unix:{tmp_path}/{number}.sock", "key")
        said = ["sh", "-c", f"echo $CUDA_VISIBLE_DEVICES $LEFT > {tmp_path}/{number}"]
        child = Process(replica, said, {**shares[number], "LEFT": "more"})
        again = asyncio.Event()  # never
        running = asyncio.create_task(
            child.run(lambda _, code: ended.set_result(code), settled=again.wait)
        )
        assert await ended == 0
        running.cancel()

    async def both() -> None:
        await asyncio.gather(say(0), say(1))

    asyncio.run(both())
    assert [(tmp_path / str(n)).read_text() for n in (0, 1)] == ["4,5 more\n", "6,7 more\n"]


def test_gpus_are_counted_before_anything_starts(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(GPUS))

    def flags(*given: str) -> Any:
        return parse(["--checkpoint", str(tiny), "--replicas", "2", *given])

    first, second = check(flags("--gpus_per_replica", "2"))
    assert first == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert second == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(CommandError, match="these are 8 GPUs, and this machine has 4"):
        check(flags("--replicas", "4", "--gpus_per_replica", "2"))
    with pytest.raises(CommandError, match="replicas have devices of their own"):
        check(flags("--device", "cuda:1"))
    assert check(flags("--device", "cpu")) == [{}, {}]
    started = command(["--port", "1"], tiny / "0.sock", 2, number=0)
    ranks = [sys.executable, "-m", "inference.replicas.ranks", "0", "2", str(tiny)]
    assert started[:6] == ranks
    assert parse([*started[6:], "--checkpoint", "x"]).port == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--replicas", "2", "--unix_socket", "x"], "--unix_socket"),
        (["--replica_urls", "http://a:1"], "--front_key"),
        (["--replica_urls", "a:1"], "http://HOST:PORT"),
        (["--replica_urls", "http://a:1,http://a:1/"], "named twice"),
        (["--replicas", "2", "--window", "4", "--sinks", "9"], "sinks=9"),
        (["--replicas", "-1"], "--replicas"),
        (["--gpus_per_replica", "2"], "--gpus_per_replica"),
        (["--replicas", "1", "--gpus_per_replica", "3"], "3 ranks cannot share"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(
    flags: list[str], words: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(tiny), "--device", "cpu", "--port", "0", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
