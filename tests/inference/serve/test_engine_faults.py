"""What fails in the engine ends the session that caused it, and no other: over real sockets."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from data_pipeline import devices
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.slots import Step
from inference.serve.limits import Limits
from tests.inference.serve.serving import Client, Running, jpeg, serving, standing_still
from tests.waiting import PATIENCE, until

CONFIG: dict[str, Any] = {"source": "file", "pace": 4, "silence_bias": 2.0, "max_output_tokens": 9}


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=4, max_tokens=128, max_sessions=3)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, Limits(fps=100)) as running:
        yield running


@pytest.fixture(autouse=True)
def _all_free(server: Running) -> Iterator[None]:
    yield
    server.wait(0)


def begin(server: Running, **session: Any) -> Client:
    client = server.open()
    client.until("session.created")
    client.update(**CONFIG, **session)
    client.until("session.updated")
    return client


def watch(client: Client, frames: int = 7) -> list[tuple[str, Any]]:
    """What a session says about some frames and a question."""
    for second in range(frames):
        more = {"prompt": "Who is it?"} if second == 2 else {}
        client.frame(jpeg(second), ts=float(second), **more)
    client.send("input_image_buffer.end")
    events = client.rest()
    kept = ("input_frame.processed", "response.output_text.delta", "response.done", "error")
    names = ("frame_at", "decision", "delta", "text", "status", "reason", "code")
    return [(e["type"], [e.get(n) for n in names]) for e in events if e["type"] in kept]


@pytest.fixture(scope="module")
def undisturbed(server: Running) -> list[tuple[str, Any]]:
    with begin(server) as client:
        said = watch(client)
    assert client.close_code == 1000
    assert len(said) > 14
    return said


def ended(client: Client, words: str) -> None:
    """The session hears why it ends, and so does whoever reads its socket's close frame."""
    client.rest()
    errors = [e for e in client.seen if e["type"] == "error"]
    assert [e["code"] for e in errors] == ["engine_error"]
    assert words in errors[0]["message"]
    assert client.seen[-1]["type"] == "session.closed"
    assert client.close_code == 1011
    assert words in (client.socket.close_reason or "")


def slot_of(server: Running, client: Client) -> Any:
    live = server.hub.find(client.seen[0]["session"]["id"])
    assert live is not None
    return live.handle._running


def test_a_step_that_fails_ends_the_session_that_caused_it(
    server: Running, engine: Engine, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(server) as good, begin(server) as bad:
        guilty, step = slot_of(server, bad), engine.step

        def failing(steps: Sequence[Step]) -> list[int | None]:
            if any(one.slot is guilty.slot for one in steps):
                raise RuntimeError("CUDA error: an illegal access")
            return step(steps)

        monkeypatch.setattr(engine, "step", failing)
        bad.frame(jpeg())
        assert watch(good) == undisturbed
        ended(bad, "illegal access")


def test_a_session_that_is_nan_ends_and_no_other(
    server: Running, engine: Engine, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with begin(server) as good, begin(server) as bad:
        guilty, step = slot_of(server, bad), engine.step

        def spoilt(steps: Sequence[Step]) -> list[int | None]:
            for one in steps:
                if one.slot is guilty.slot:
                    one.frames = [frame * torch.nan for frame in one.frames]
            return step(steps)

        monkeypatch.setattr(engine, "step", spoilt)
        bad.frame(jpeg())
        assert watch(good) == undisturbed
        ended(bad, "its logits are NaN")


def test_out_of_memory_together_is_not_the_end_of_both(
    server: Running, engine: Engine, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of two sessions at once fail in the middle of the model; each alone goes through."""
    layer, step = engine.model.model.language_model.layers[3], engine.step
    together, failed = [False], [0]
    forward = layer.forward

    def short(*args: Any, **kwargs: Any) -> Any:
        if together[0]:
            failed[0] += 1
            raise torch.OutOfMemoryError("no memory is left")
        return forward(*args, **kwargs)

    def counted(steps: Sequence[Step]) -> list[int | None]:
        together[0] = len(steps) > 1
        return step(steps)

    monkeypatch.setattr(layer, "forward", short)
    monkeypatch.setattr(engine, "step", counted)
    all_wait = threading.Event()
    with begin(server) as first, begin(server) as second, ThreadPoolExecutor(2) as pool:
        tasks = [slot_of(server, client).task for client in (first, second)]
        server.hub.runner.call(lambda: all_wait.wait(PATIENCE))
        watching = [pool.submit(watch, client) for client in (first, second)]
        until(lambda: all(len(task.frames) == 4 for task in tasks))  # as many as may
        all_wait.set()
        said = [one.result() for one in watching]
    assert failed[0] > 3
    assert said == [undisturbed, undisturbed]


@pytest.mark.parametrize("method", ["next_step", "on_token", "state_of_close"])
def test_an_exception_in_a_session_ends_it_alone(
    server: Running, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("a fault of ours")

    with begin(server) as good, begin(server) as bad:
        task = slot_of(server, bad).task
        if method == "state_of_close":
            monkeypatch.setattr(task, "close", broken)
            monkeypatch.setattr(task, "next_step", broken)
        else:
            monkeypatch.setattr(task, method, broken)
        bad.frame(jpeg())
        assert watch(good) == undisturbed
        ended(bad, "a fault of ours")
    assert server.get("/health").json()["status"] == "ok"


def test_health_knows_a_step_that_does_not_end(
    server: Running, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def health() -> tuple[int, str]:
        answer = server.get("/health")
        return answer.status_code, answer.json()["status"]

    monkeypatch.setattr(server.hub, "limits", replace(server.hub.limits, step=0.2))
    with begin(server) as client:
        with standing_still(engine):
            client.frame(jpeg())
            until(lambda: health() == (503, "stuck"))
        client.until("input_frame.processed")
        until(lambda: health() == (200, "ok"))
        client.send("session.close")
        client.rest()


@pytest.mark.parametrize("words", ["a rank has gone", "CUDA error: an illegal memory access"])
def test_a_server_whose_engine_has_ended_ends_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """As with an engine of several processes, of which another may have failed; or on a GPU that
    refuses all further work of the process: who has started it starts it again."""

    def failing(*_: Any) -> Any:
        raise RuntimeError(words)

    if words.startswith("CUDA"):
        monkeypatch.setattr(devices, "synchronize", failing)
    else:
        monkeypatch.setattr(engine, "recovers", lambda: False)
    monkeypatch.setattr(engine, "step", failing)
    with serving(engine) as server, begin(server) as first, begin(server) as second:
        first.frame(jpeg())
        ended(first, words)
        ended(second, words)
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
        assert words in server.hub.runner.failed
        assert server.hub.status == "failed"


def test_a_server_whose_engine_is_stuck_ends_when_it_is_told(tiny: Path, tmp_path: Path) -> None:
    """Nothing in the process can end that step, and whoever stops a server waits for its end."""
    written, body = tmp_path / "written", {"messages": [{"role": "user", "content": "A"}]}
    flags = ["--checkpoint", str(tiny), "--device", "cpu", "--port", "0", "--limit_step", "0.5"]
    with written.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.stuck_server", *flags], stderr=out
        )
    try:
        until(lambda: process.poll() is not None or "http://" in written.read_text())
        url = f"http://{written.read_text().split('http://')[1].split('/')[0]}"
        with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=PATIENCE) as client:
            asked = pool.submit(client.post, f"{url}/v1/chat/completions", json=body)
            until(lambda: httpx.get(f"{url}/health", timeout=PATIENCE).json()["status"] == "stuck")
            process.terminate()
            assert process.wait(PATIENCE) == 1
            assert asked.exception() is not None or asked.result().status_code == 500
    finally:
        process.kill()
        process.wait()
    assert "the engine does not end its step: the process ends without it" in written.read_text()
