"""Chat requests at the front: streams, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request

from inference.engine.load import load_engine
from inference.replicas.places import Places
from inference.replicas.proxy import Proxy
from inference.replicas.replica import Replica
from inference.serve import answers
from inference.serve.access import Access
from inference.serve.limits import Limits
from tests.inference.replicas.fronting import FRONT_KEY, fronting
from tests.inference.serve.serving import CHAT, Running, serving, standing_still
from tests.waiting import PATIENCE, until

ASKED = {"messages": [{"role": "user", "content": "A"}], "stream": True, "ignore_eos": True}


def test_a_client_that_leaves_as_its_stream_begins_leaves_nothing(tiny: Path) -> None:
    """It has read nothing of what was sent before, so that no piece is sent on."""
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=512, max_sessions=1)
    with serving(engine, Limits(), access=Access(front_key=FRONT_KEY)) as server:
        asyncio.run(asyncio.wait_for(_leave(server), PATIENCE))
        server.wait(0)  # the replica has stopped, too


async def _leave(server: Running) -> None:
    replica, limits = Replica(0, server.http, FRONT_KEY), Limits()
    assert await replica.look(PATIENCE) == "ok"
    replica.state = "ready"
    proxy = Proxy(Places([replica], lambda wanted: False), limits)
    body = json.dumps({**ASKED, "max_tokens": 400}).encode()
    left = asyncio.Event()
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if events:
            return events.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(3600)  # until the client reads

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    visit = Access().accounts[0].enter("chat", {})
    answer = await proxy.complete(Request(scope, receive), visit)
    assert replica.chats == 1
    left.set()
    await answer(scope, receive, send)
    assert replica.chats == 0
    assert proxy.held == 0
    await replica.http.aclose()


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_a_replica_that_is_stuck_waits_no_longer(tiny: Path, stream: bool) -> None:
    """One that others have started, so that nobody ends it and its connections: a whole answer is
    asked for again elsewhere, a stream that has begun ends."""
    options: Any = {"device": "cpu", "window": 8, "max_tokens": 512, "max_sessions": 1}
    engines = [load_engine(tiny, **options) for _ in range(2)]
    body = {**ASKED, "max_tokens": 60, "stream": stream}
    with fronting(engines, Access(), Limits(step=0.5)) as front, contextlib.ExitStack() as stack:
        stuck = front.between_turns(lambda: front.front.places.for_chat([]))
        assert stuck is not None
        stack.enter_context(standing_still(engines[stuck.number], steps=20))
        answer = httpx.post(front.http + CHAT, json=body, timeout=PATIENCE)
        until(lambda: stuck.state == "dead")
        until(lambda: stuck.chats == 0)
    if stream:
        *_, error, done = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"
        assert done == "data: [DONE]"
    else:
        assert answer.json()["usage"]["completion_tokens"] == 60


def test_who_waits_for_a_machine_that_is_off_waits_no_longer() -> None:
    """Its connections stay, and nothing comes."""
    asyncio.run(asyncio.wait_for(_wait_for_silence(), PATIENCE))


async def _wait_for_silence() -> None:
    came = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"max_tokens")
        came.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    replica = Replica(0, f"http://{host}:{port}", FRONT_KEY)
    replica.state = "ready"
    proxy = Proxy(Places([replica], lambda wanted: False), Limits(wait=0.1))
    body = {"type": "http.request", "body": json.dumps({**ASKED, "max_tokens": 4}).encode()}
    events, left = [body], asyncio.Event()

    async def receive() -> Any:
        if not events:
            await left.wait()
        return events.pop()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
    visit = Access().accounts[0].enter("chat", {})
    asked = asyncio.create_task(proxy.complete(Request(scope, receive), visit))
    await came.wait()
    assert not asked.done()
    replica.lose()
    assert (await asked).status_code == 503  # no other one is there
    assert (replica.chats, proxy.held) == (0, 0)
    await replica.http.aclose()
    server.close()


def test_a_stream_goes_on_through_the_front_while_nothing_is_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "QUIET", 0.05)
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=512, max_sessions=1)
    lines, body = list[str](), {**ASKED, "max_tokens": 3}
    with (
        fronting([engine], Access()) as front,
        standing_still(engine),
        httpx.stream("POST", front.http + CHAT, json=body, timeout=PATIENCE) as streamed,
    ):
        for line in streamed.iter_lines():
            lines += [line] if line else []
            if lines.count(":") == 3:
                break
    assert streamed.headers["X-Accel-Buffering"] == "no"
    assert lines[0].startswith("data: {")
    assert lines[1:] == [":"] * 3
