"""What a session may hold: known from sizes, against the buffers; and a ceiling for all of them."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from data_pipeline import devices
from inference.engine.cache_sizes import gib
from inference.engine.engine import Engine, EngineFull
from inference.engine.load import load_engine
from inference.serve.limits import Limits
from inference.serve.memory import Ceiling, SessionMemory
from tests.inference.serve.serving import Running, jpeg, serving, standing_still
from tests.inference.tiny import SIZE
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def each(engine: Engine) -> SessionMemory:
    return SessionMemory.of(engine, SIZE)


def chat(server: Running, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "A"}], "max_tokens": 3, **fields}
    return server.post(json=body)


def test_the_memory_of_a_session_is_what_its_buffers_have(
    engine: Engine, each: SessionMemory
) -> None:
    cache = engine.cache
    assert each.text * engine.max_sessions == cache.text.untyped_storage().nbytes()
    assert each.frames * engine.max_sessions == cache.frames.untyped_storage().nbytes()
    assert each.pixels == 5 * torch.zeros(3, SIZE, SIZE, dtype=torch.uint8).nbytes


def test_sessions_that_do_not_fit_the_device_are_refused_before_they_are_allocated(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="for all, and cpu has ") as wrong:
        load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=10**7)
    most = int(str(wrong.value).split("give max_sessions ")[1].split()[0])
    assert 0 < most < 10**7
    monkeypatch.setattr(devices, "free_memory", lambda _: 1000)
    with pytest.raises(ValueError, match="give a smaller window or max_tokens"):
        load_engine(tiny, device="cpu", window=16, max_tokens=512)


def test_a_session_beyond_the_ceiling_is_refused_with_both_figures(
    engine: Engine, each: SessionMemory
) -> None:
    limits = Limits(sessions_memory=2 * each.total + 1000, wait=0.5)
    with serving(engine, limits) as server:
        with server.open() as first, server.open() as second:
            for client in (first, second):
                client.until("session.created")
            with server.open() as third:
                assert third.close_code == 1013
                reason = third.socket.close_reason or ""
                assert gib(each.total) in reason
                assert "1000 bytes of the" in reason
            full = chat(server)
            assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
            assert gib(each.kept) in full.json()["error"]["message"]
            # One that waits is answered when another session has ended.
            server.hub.limits = replace(limits, wait=PATIENCE)
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(chat, server)
                until(lambda: server.hub.waiting == 1)
                second.send("session.close")
                second.until("session.closed")
                assert waiting.result().status_code == 200
        large = chat(server, n=3)
        assert large.status_code == 413
        server.wait(0)
        until(lambda: server.hub.memory.held == 0)


def test_those_who_are_away_give_their_memory_to_those_who_are_there(
    engine: Engine, each: SessionMemory
) -> None:
    """First their places: their context alone stays. Then all of it."""
    with serving(engine, Limits(sessions_memory=2 * each.total)) as server:
        gone = []
        for _ in range(2):
            with server.open() as client:
                gone.append(client.until("session.created")["session"]["id"])
                client.frame(jpeg())
                client.until("input_frame.processed")
            server.wait_left(gone[-1])
        with server.open() as first:
            first.until("session.created")
            held = server.hub.memory.held
            assert each.total < held <= 2 * each.total
            with server.open() as second:
                second.until("session.created")
                with server.open(f"?session={gone[0]}&last_seq=1") as again:
                    assert again.close_code in (4404, 1013)
                assert server.hub.memory.held <= 2 * each.total


def test_what_is_promised_to_one_is_not_given_to_another() -> None:
    ceiling = Ceiling(100)
    ceiling.take("parked", 10)
    with ceiling.promised(60, "parked"):
        assert ceiling.held == 60
        with pytest.raises(EngineFull), ceiling.promised(41):
            pass
        ceiling.give_back("parked")  # it has ended meanwhile
        with ceiling.promised(50):
            assert ceiling.held == 100
    assert ceiling.held == 0


def test_a_session_that_ends_while_its_client_comes_back_leaves_nothing_behind(
    engine: Engine, each: SessionMemory
) -> None:
    with serving(engine, Limits(sessions_memory=3 * each.total)) as server:
        with server.open() as client:
            name = client.until("session.created")["session"]["id"]
            client.frame(jpeg())
            client.until("input_frame.processed")
        server.wait_left(name)
        live, loop = server.hub.sessions[name], server.server.servers[0].get_loop()

        async def make_room() -> bool:
            made = asyncio.create_task(server.hub.make_room(0))
            await asyncio.sleep(0)
            assert live.parked  # whoever comes back from now on must wait for a place
            return await made

        assert asyncio.run_coroutine_threadsafe(make_room(), loop).result(PATIENCE)
        with server.open() as other:
            other.until("session.created")
            with standing_still(engine):
                other.frame(jpeg())
                until(lambda: server.hub.runner.busy > 0)
                with ThreadPoolExecutor(1) as pool:
                    back = pool.submit(server.open, f"?session={name}&last_seq=1")
                    until(lambda: server.between_turns(lambda: server.hub.runner._calls))
                    live.close("its time is over")
                    again = back.result()
            with again:
                assert again.rest()[-1]["reason"] == "its time is over"
            other.send("session.close")
            other.rest()
        until(lambda: server.hub.memory.held == 0)


def test_usage_is_told_and_its_totals_at_the_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the tokens that the prompt builder writes; it says nothing of itself."""
    monkeypatch.setattr("inference.session.runner.METRICS_EVERY", 0.0)
    with serving(engine, Limits(fps=60)) as server:
        began = time.monotonic()
        with server.open() as client:
            client.until("session.created")
            client.update(source="file", silence_bias=100)
            for second in range(4):
                client.frame(jpeg(second), ts=float(second))
            client.until("input_frame.processed", frame_at=3.0)
            client.ask("Who is it?")
            client.until("session.state", state="silent")
            client.send("input_image_buffer.end")
            events = client.rest()
        seconds = time.monotonic() - began
        vocabulary = server.hub.runner.vocabulary
    told = [event for event in events if event["type"] == "session.usage"]
    assert [event["frames"] for event in told] == [1, 2, 3, 4, 4]
    asked = len(vocabulary.user_turn("Who is it?"))
    expected = 1 + len(vocabulary.user_turn("")) + 4 + 1 + asked
    usage = events[-1]["usage"]
    assert (usage["frames"], usage["input_tokens"], usage["output_tokens"]) == (4, expected, 0)
    # From before the first event to after the last but one.
    first, last = events[0]["t_server"], events[-2]["t_server"]
    assert last - first - 0.01 < usage["seconds"] < seconds
