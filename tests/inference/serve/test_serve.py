"""Sessions over WebSockets: the protocol, coming back, and what is refused."""

from __future__ import annotations

import base64
import contextlib
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.serve.limits import Limits
from tests.inference.serve.serving import Client, Running, data_url, jpeg, serving
from tests.waiting import until

BIAS = 4.0
CONFIG: dict[str, Any] = {"source": "file", "pace": 4, "silence_bias": BIAS, "max_output_tokens": 9}


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    limits = Limits(
        grace=60.0, replay=200, pixels=10**6, frame_bytes=10**5, prompt_chars=200, fps=60
    )
    with serving(engine, limits) as running:
        yield running


@pytest.fixture(autouse=True)
def _all_free(server: Running) -> Iterator[None]:
    yield
    server.wait(0)


def said(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """What does not depend on time."""
    names = ("frame_at", "decision", "text", "delta", "status", "reason", "state")
    kept = ("input_frame.processed", "response.done", "response.output_text.delta", "session.state")
    return [(e["type"], [e.get(n) for n in names]) for e in events if e["type"] in kept]


def play(client: Client, frames: int = 6) -> None:
    client.until("session.created")
    client.update(**CONFIG)
    for second in range(frames):
        more = {"prompt": "Who is it?"} if second == 3 else {}
        client.frame(jpeg(second), ts=float(second), **more)
    client.send("input_image_buffer.end")


def test_a_session_is_the_runners(server: Running, engine: Engine) -> None:
    """The same frames and questions as through Python: the same decisions and words."""
    with server.open() as client:
        play(client)
        events = client.rest()
    assert client.close_code == 1000
    assert [e["seq"] for e in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "session.created"
    assert all({"t_server", "t_media", "seq"} <= set(e) for e in events)
    assert events[-1]["type"] == "session.closed"
    sampling = Sampling(silence_bias=BIAS)
    server.wait(0)
    with server.hub.runner.session(
        live=False, clock="media", pace=4, sampling=sampling, max_new_tokens=9
    ) as session:
        for second in range(6):
            session.put_frame(jpeg(second), float(second), "Who is it?" if second == 3 else None)
        session.end()
        expected = [event.as_dict() for event in session.events()]
    assert said(events) == said(expected)
    assert len(said(events)) > 12


def test_a_client_that_comes_back_gets_what_it_missed(server: Running) -> None:
    with server.open() as first:
        created = first.until("session.created")
        first.update(**CONFIG)
        for second in range(3):
            first.frame(jpeg(second), ts=float(second))
        first.until("input_frame.processed", frame_at=1.0)
    last = first.seen[-1]["seq"]
    time.sleep(0.2)  # the session goes on without a socket
    with server.open(f"?session={created['session']['id']}&last_seq={last}") as again:
        again.frame(jpeg(3), ts=3.0)
        again.until("input_frame.processed", frame_at=3.0)
        again.send("session.close")
        again.rest()
    seqs = [e["seq"] for e in first.seen + again.seen]
    assert seqs == list(range(1, len(seqs) + 1))
    assert again.close_code == 1000


def test_after_the_grace_time_a_session_is_gone(engine: Engine) -> None:
    with serving(engine, Limits(grace=0.3)) as server:
        with server.open() as first:
            created = first.until("session.created")
            first.frame(jpeg())
            first.until("input_frame.processed")
            live = server.hub.sessions[created["session"]["id"]]
        until(lambda: not server.hub.sessions)
        assert live.handle.reason == "nobody came back within 0.3 s"
        seen, *_, closed = live.handle.log.follow(first.seen[-1]["seq"] - 1)  # to its end
        assert closed.type == "session.closed"
        assert closed.t_server - seen.t_server > 0.3
        with server.open(f"?session={created['session']['id']}&last_seq=1") as again:
            assert again.close_code == 4404
        with server.open("?session=sess_guessed") as guessed:
            assert guessed.close_code == 4404


def test_another_connection_takes_the_session_over(server: Running) -> None:
    with server.open() as first:
        created = first.until("session.created")
        first.frame(jpeg())
        first.until("input_frame.processed")
        with server.open(f"?session={created['session']['id']}&last_seq=0") as second:
            assert second.until("session.created")["session"] == created["session"]
            assert first.close_code == 4409
            second.send("session.close")
            second.until("session.closed")


def test_more_events_than_are_kept_are_reported_as_lost(server: Running) -> None:
    with server.open() as first:
        created = first.until("session.created")
        first.frame(jpeg())
        first.until("input_frame.processed")
    live = server.hub.find(created["session"]["id"])
    assert live is not None
    for number in range(300):
        live.handle.emit("session.state", state="silent", number=number)
    with server.open(f"?session={created['session']['id']}&last_seq=2") as again:
        lost = again.next()
        following = again.next()
        again.send("session.close")
        again.rest()
    assert (lost["type"], lost["code"], lost["from_seq"]) == ("error", "events_lost", 3)
    assert following["seq"] == lost["to_seq"] + 1


def test_a_response_is_interrupted_and_cancelled(server: Running) -> None:
    with server.open() as client:
        client.until("session.created")
        client.update(pace=20, silence_bias=-50, temperature=0.8, seed=3)
        client.ask("Tell me a story.")
        client.until("response.output_text.delta")
        client.ask("Another one.")
        cut = client.until("response.done")
        assert (cut["status"], cut["reason"]) == ("cancelled", "interrupted")
        assert client.until("conversation.item.created")["interrupted"]
        client.until("response.output_text.delta")
        client.send("response.cancel")
        assert client.until("response.done")["reason"] == "client_cancelled"
        assert client.until("session.state")["state"] == "silent"
        client.send("response.cancel")
        assert client.until("error")["code"] == "nothing_to_cancel"
        client.update(silence_bias=1000)
        assert "from -100 to 100" in client.until("error")["message"]
        client.update(silence_bias=100, temperature=0)  # from now on it keeps silent
        client.until("session.updated")
        for second in range(3):
            client.frame(jpeg(second), ts=float(second))
            assert client.until("input_frame.processed")["decision"] == "silence"
        client.send("session.close")
        client.rest()


WRONG = [
    ("no json", "invalid_json"),
    ("[1]", "invalid_message"),
    ('{"type": "session.destroy"}', "unknown_type"),
    ('{"type": "session.update"}', "invalid_message"),
    ('{"type": "session.update", "session": {"pace": 0}}', "invalid_value"),
    ('{"type": "session.update", "session": {"pace": true}}', "invalid_value"),
    ('{"type": "session.update", "session": {"temperature": NaN}}', "invalid_json"),
    ('{"type": "session.update", "session": {"model": "x"}}', "model_not_found"),
    ('{"type": "session.update", "session": {"source": "/etc/passwd"}}', "invalid_value"),
    ('{"type": "session.update", "session": {"seed": 1.5}}', "invalid_value"),
    ('{"type": "session.update", "sesion": {}}', "unknown_field"),
    ('{"type": "input_image_buffer.append", "timestamp": 1}', "unknown_field"),
    ('{"type": "response.cancel", "response": "x"}', "unknown_field"),
    ('{"type": "input_image_buffer.append", "image": "?"}', "invalid_value"),
    ('{"type": "input_image_buffer.append", "image": "bm8gcGljdHVyZQ=="}', "undecodable_image"),
    ('{"type": "input_image_buffer.append", "ts": -1}', "invalid_value"),
    ('{"type": "conversation.item.create", "item": {"content": []}}', "invalid_message"),
    ('{"type": "conversation.item.create", "item": {"content": "x", "at": 1}}', "unknown_field"),
    ('{"type": "conversation.item.create", "item": {"role": "system", "content": "x"}}',
     "invalid_value"),
    (json.dumps({"type": "conversation.item.create", "item": {"content": "x" * 201}}), "too_large"),
    (json.dumps({"type": "conversation.item.create", "item": {"content": [
        {"type": "input_text", "text": "What?"},
        {"type": "input_image", "image_url": "file:///etc/passwd"}]}}), "invalid_url"),
]  # fmt: skip


def test_wrong_messages_get_an_error_and_the_session_goes_on(server: Running) -> None:
    with server.open() as client:
        for message, code in WRONG:
            client.socket.send(message)
            assert client.until("error")["code"] == code, message
        client.send("input_image_buffer.append", ts=1.0)
        client.send("input_image_buffer.append", ts=2.0)  # where is the picture?
        assert client.until("error")["code"] == "wrong_order"
        client.frame(jpeg())
        client.until("input_frame.processed")
        client.update(prompt="Too late.")
        assert "before the first input" in client.until("error")["message"]
        client.send("session.close")
        assert client.until("session.closed")


def test_too_many_wrong_messages_close_the_socket(server: Running) -> None:
    with server.open() as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(40):
                client.socket.send("no json")
        assert client.close_code == 1008


def test_large_pictures_are_refused_before_they_are_decoded(server: Running) -> None:
    """Few bytes, many pixels; many bytes; more than a message may have."""
    bomb = jpeg_of_one_colour(8000)
    assert len(bomb) > 0
    with server.open() as client:
        client.until("session.created")
        client.frame(bomb[:100_000] if len(bomb) > 100_000 else bomb)
        error = client.until("error")
        assert error["code"] == "too_many_pixels"
        assert "8000 x 8000" in error["message"]
        client.frame(jpeg(0, (600, 400)))
        assert client.until("error")["code"] == "too_large"
        with contextlib.suppress(ConnectionClosed):
            client.socket.send(b"x" * 10**6)
        assert client.close_code == 1009


def jpeg_of_one_colour(side: int) -> bytes:
    """PNG: a few kilobytes that would decode to 3 side^2 bytes."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG", optimize=True)
    return out.getvalue()


def test_a_picture_may_come_in_json_and_with_a_question(server: Running) -> None:
    with server.open() as client:
        client.until("session.created")
        client.update(**CONFIG)
        image = base64.b64encode(jpeg()).decode()
        client.send("input_image_buffer.append", image=image, ts=4.5)
        assert client.until("input_frame.processed")["frame_at"] == 4.5
        parts = [
            {"type": "input_text", "text": "Who is it?"},
            {"type": "input_image", "image_url": data_url(jpeg(1), "image/jpeg")},
        ]
        client.send("conversation.item.create", item={"type": "message", "content": parts})
        assert client.until("conversation.item.created")["text"] == "Who is it?"
        client.until("input_frame.processed")
        client.send("conversation.item.create", item={"type": "message", "content": "And now?"})
        assert client.until("conversation.item.created")["text"] == "And now?"
        client.send("session.close")
        client.rest()


def test_two_sessions_have_seeds_of_their_own(server: Running) -> None:
    with server.open() as first, server.open() as second:
        seeds = [c.until("session.created")["session"]["seed"] for c in (first, second)]
        assert seeds[0] != seeds[1]
        first.update(seed=7, temperature=None)
        assert first.until("session.updated")["session"]["seed"] == 7
        first.update(seed=None, top_k=-1)  # null: as it is
        assert first.until("session.updated")["session"]["seed"] == 7


def test_a_session_is_refused_when_all_places_are_taken(server: Running) -> None:
    """And places whose clients leave before any input are free at once."""
    with contextlib.ExitStack() as clients:
        for _ in range(3):
            clients.enter_context(server.open()).until("session.created")
        held = list(server.hub.sessions.values())
        with server.open() as one_more:
            assert one_more.close_code == 1013
    server.wait(0)
    assert [live.handle.reason for live in held] == ["its client left before any input"] * 3
    assert 'moss_refused_total{reason="full"} ' in server.hub.page().decode()


def get(url: str, key: str | None = None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_and_metrics(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.serve.metrics._RECENT", 600.0)  # however long this takes
    with server.open() as client:
        play(client)
        client.rest()
    server.wait(0)
    status, health = get(f"{server.http}/health")
    found = json.loads(health)
    assert (status, found["status"], found["max_sessions"]) == (200, "ok", 3)
    _, text = get(f"{server.http}/metrics")
    values = {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if not line.startswith("#")
    }
    decided = [values[f'moss_decisions_total{{decision="{d}"}}'] for d in ("silence", "speech")]
    assert sum(decided) == values["moss_frame_decision_seconds_count"] >= 6
    assert values["moss_frames_total"] == values["moss_frame_lag_seconds_count"] >= sum(decided)
    assert values["moss_silence_ratio"] == decided[0] / sum(decided)
    assert values["moss_tokens_per_second"] > 0
    for name in ("ttft", "inter_token", "frame_decision", "interruption"):
        assert values[f"moss_{name}_seconds_count"] > 0
    assert values['moss_inter_token_quantile_seconds{quantile="0.99"}'] > 0
    assert (values["moss_sessions"], values["moss_cached_frames"]) == (0, 0)


def test_routes_and_sessions_ask_for_the_key(engine: Engine) -> None:
    with serving(engine, key="secret") as server:
        assert get(f"{server.http}/health")[0] == 200
        for path in ("/metrics", "/v1/models"):
            assert get(server.http + path)[0] == 401
            assert get(server.http + path, "wrong")[0] == 401
            assert get(server.http + path, "secret")[0] == 200
        with server.open() as client:
            assert client.close_code == 1008
        header = {"Authorization": "Bearer secret"}
        protocols = ["realtime", "openai-insecure-api-key.secret"]
        for options in ({"additional_headers": header}, {"subprotocols": protocols}):
            with server.open(**options) as client:
                assert client.until("session.created")


def test_pages_of_other_sites_open_no_sessions(engine: Engine) -> None:
    with serving(engine, origins=["https://mine.example"]) as server:
        for origin, opens in (
            ("https://evil.example", False),
            ("https://mine.example", True),
            (server.http, True),
        ):
            with server.open(origin=origin) as client:
                assert (
                    (client.next()["type"] == "session.created")
                    if opens
                    else client.close_code == 1008
                )


def test_a_model_that_cannot_watch_opens_no_session(engine: Engine) -> None:
    with serving(engine, stage="sft") as server, server.open() as client:
        assert client.close_code == 1008
        assert "has not learned to watch" in (client.socket.close_reason or "")


def test_an_idle_session_ends(engine: Engine) -> None:
    with serving(engine, Limits(idle=0.3)) as server, server.open() as client:
        assert client.until("session.closed")["reason"] == "idle for 0.3 s"
        assert client.close_code == 4408


def test_shutting_down_tells_every_session(engine: Engine) -> None:
    with serving(engine) as server:
        clients = [server.open() for _ in range(2)]
        for client in clients:
            client.until("session.created")
            client.update(pace=None, silence_bias=-50)
            client.ask("Tell me a story.")
            client.until("response.output_text.delta")
        server.server.should_exit = True
        for client in clients:
            reason = client.until("session.closed")["reason"]
            assert reason == "the server is shutting down"
            assert client.close_code == 1001
