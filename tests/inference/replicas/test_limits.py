"""The limits of a key over several replicas: they are one for all of them, held at the front."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference.engine.load import load_engine
from inference.replicas.replica import Replica
from inference.serve.access import Access
from inference.serve.audit import AuditLog
from inference.serve.keys import Key
from inference.serve.limits import Limits
from tests.conftest import REPO
from tests.inference.replicas.fronting import FRONT_KEY, Fronted, fronting
from tests.inference.serve.serving import Client, audited, jpeg, standing_still
from tests.waiting import PATIENCE, until

FPS = 10
TWO, LIVE, FILE, READER, PLAIN, CHIEF = (
    f"key-{n}-0123" for n in ("two", "live", "file", "reader", "plain", "chief")
)
KEYS = [
    Key(name="two", key=TWO, sessions=2),
    Key(name="live", key=LIVE, frames_per_second=FPS),
    Key(name="file", key=FILE, frames_per_second=FPS),
    Key(name="reader", key=READER, tokens_per_minute=40),
    Key(name="plain", key=PLAIN),
    Key(name="chief", key=CHIEF, operator=True),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def front(tiny: Path, log: Path) -> Iterator[Fronted]:
    options: dict[str, Any] = {"device": "cpu", "window": 64, "max_tokens": 512, "max_sessions": 2}
    engines = [load_engine(tiny, **options) for _ in range(2)]
    access = Access(KEYS, audit=AuditLog(str(log), 10**6, 2))
    with fronting(engines, access, Limits(fps=200, decoders=1)) as running:
        yield running
    access.close()


@pytest.fixture(autouse=True)
def _all_free(front: Fronted) -> Iterator[None]:
    yield
    until(lambda: not any(one.sessions or one.chats for one in front.front.replicas), PATIENCE)


def chat(front: Fronted, key: str, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "A"}], "max_tokens": 6, **fields}
    return httpx.post(
        f"{front.http}/v1/chat/completions", json=body, timeout=PATIENCE,
        headers={"Authorization": f"Bearer {key}"},
    )  # fmt: skip


def line(log: Path, **fields: Any) -> dict[str, Any]:
    """The last one of the audit log with these fields."""

    def found() -> list[dict[str, Any]]:
        return [one for one in audited(log) if fields.items() <= one.items()]

    until(lambda: bool(found()), PATIENCE)
    return found()[-1]


def on_both(front: Fronted, key: str) -> list[Client]:
    """Two sessions, one on each replica."""
    clients = [front.open(key) for _ in range(2)]
    for client in clients:
        client.until("session.created")
    assert [len(replica.sessions) for replica in front.front.replicas] == [1, 1]
    return clients


def test_a_key_has_its_sessions_on_all_replicas_together(front: Fronted, log: Path) -> None:
    first, second = on_both(front, TWO)
    with front.open(TWO) as third:
        assert third.next()["error"]["code"] == "rate_limit_exceeded"
        assert third.close_code == 1013
    refused = chat(front, TWO)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    name = first.seen[0]["session"]["id"]
    with front.open(PLAIN, f"?session={name}&last_seq=0") as thief:
        assert thief.close_code == 4404
    with front.open(TWO, f"?session={name}&last_seq=999") as early:  # than its events
        assert early.close_code == 4404
    first.frame(jpeg())
    first.until("input_frame.processed")
    for client in (first, second):
        client.send("session.close")
        client.rest()
    usage = first.seen[-1]["usage"]
    told = line(log, key="two", id=name)
    assert told["usage"] == {**usage, "seconds": told["usage"]["seconds"]}
    assert (told["ended"], told["asked"]["source"]) == ("done", "live")


@pytest.mark.parametrize("source", ["live", "file"])
def test_frames_per_second_do_not_multiply(front: Fronted, source: str) -> None:
    count, began = 3 * FPS // 2, time.monotonic()
    clients = on_both(front, LIVE if source == "live" else FILE)
    for client in clients:
        client.update(source=source, silence_bias=100)
        client.until("session.updated")
        for second in range(count):
            client.frame(jpeg(), ts=float(second))
        client.send("input_image_buffer.end")
    for client in clients:
        client.rest()
    may = 2 * FPS + FPS * (time.monotonic() - began)
    events = [event for client in clients for event in client.seen]
    dropped = [event for event in events if event["type"] == "input_frame.dropped"]
    limited = sum(event["count"] for event in dropped if event["reason"] == "rate_limited")
    if source == "live":
        assert 2 * count - may - 1 <= limited <= 2 * count - 2 * FPS
    else:
        assert not dropped
        assert 2 * count <= may
        assert sum(event["type"] == "input_frame.processed" for event in events) == 2 * count


def test_tokens_are_counted_where_the_clients_are(front: Fronted, log: Path) -> None:
    """Whole answers and streams, on any replica; as the answers themselves say."""
    used, answer = 0, chat(front, READER)
    while answer.status_code == 200:
        used += answer.json()["usage"]["total_tokens"]
        answer = chat(front, READER)
    assert (answer.status_code, used > 40) == (429, True)
    answered = chat(front, PLAIN).json()
    whole = answered["usage"]
    told = line(log, key="plain", kind="chat", id=answered["id"])
    assert told["asked"] == asked(6)
    assert told["usage"]["input_tokens"] == whole["prompt_tokens"]
    assert told["usage"]["output_tokens"] == whole["completion_tokens"]
    streamed = chat(front, PLAIN, stream=True, stream_options={"include_usage": True}).text
    assert all(part.startswith("data: ") for part in streamed.split("\n\n") if part)
    last = json.loads(streamed.split("\n\n")[-3].removeprefix("data: "))
    assert last["usage"] == whole
    told = line(log, key="plain", kind="chat", id=last["id"])
    assert told["usage"]["output_tokens"] == whole["completion_tokens"]
    wrong = chat(front, PLAIN, temprature=1)
    assert wrong.status_code == 400
    assert line(log, key="plain", ended="refused")["code"] == "unknown_field"


def said(front: Fronted, name: str) -> float:
    """Tokens of a key's answers so far."""
    headers = {"Authorization": f"Bearer {CHIEF}"}
    page = httpx.get(f"{front.http}/metrics", headers=headers, timeout=PATIENCE).text
    return sum(
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "moss_key_tokens_total"
        and sample.labels == {"key": name, "direction": "output"}
    )


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_left_counts_as_far_as_it_went(
    front: Fronted, log: Path, stream: bool
) -> None:
    """And while it is made."""
    body = {"messages": [{"role": "user", "content": "A"}], "stream": stream, "max_tokens": 400}
    text = json.dumps({**body, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {front.host}\r\nContent-Length: {len(text)}"
    )
    head += f"\r\nContent-Type: application/json\r\nAuthorization: Bearer {PLAIN}\r\n\r\n"
    before = said(front, "plain")
    host, port = front.host.split(":")
    with contextlib.ExitStack() as stack:
        for engine in front.engines:  # the answer does not end before its client leaves
            stack.enter_context(standing_still(engine, steps=50))
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + text)
            until(lambda: said(front, "plain") > before, PATIENCE)
        usage = line(log, key="plain", ended="client_left", asked={**asked(400), "stream": stream})
    assert 1 <= usage["usage"]["output_tokens"] < 400
    assert usage["usage"]["input_tokens"] > 0


def asked(most: int) -> dict[str, Any]:
    return {"messages": 1, "frames": 0, "n": 1, "max_tokens": most, "stream": False}


def test_the_fronts_page_has_its_keys_and_the_replicas_figures_once(front: Fronted) -> None:
    headers = {"Authorization": f"Bearer {CHIEF}"}
    page = httpx.get(f"{front.http}/metrics", headers=headers, timeout=PATIENCE).text
    types = [one.split()[2] for one in page.splitlines() if one.startswith("# TYPE")]
    assert len(types) == len(set(types))
    assert "moss_key_tokens_total" in page
    assert "moss_frames_total" in page
    docs = [(REPO / "docs" / name).read_text() for name in ("serving.md", "replicas.md")]
    documented = set(re.findall(r"moss_\w+", "".join(docs)))
    assert {one for one in types if not one.endswith("_created")} <= documented
    for key, client, status in (
        (CHIEF, None, 200), (PLAIN, None, 401), (CHIEF, "10.0.0.7", 403), (CHIEF, "anybody", 403),
        (CHIEF, "::ffff:127.0.0.1", 200), (CHIEF, "::ffff:10.0.0.7", 403),
    ):  # fmt: skip
        headers = {"Authorization": f"Bearer {key}"}
        headers |= {} if client is None else {"X-Forwarded-For": client}  # by a proxy here
        answer = httpx.get(f"{front.http}/admin/replicas", headers=headers, timeout=PATIENCE)
        assert answer.status_code == status
    for number in ("7", "first", "9" * 5000, "%00"):
        url = f"{front.http}/admin/replicas/{number}/drain"
        assert httpx.post(url, timeout=PATIENCE).json()["error"]["code"] == "unauthorized"
        answer = httpx.post(url, headers={"Authorization": f"Bearer {CHIEF}"}, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_session_whose_pictures_the_front_cannot_keep_is_refused(tiny: Path) -> None:
    """Those whose clients are away give their memory first."""
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=256, max_sessions=3)
    each = 2**20 + 2**24
    limits = Limits(sessions_memory=2 * each, decoders=1)
    access = Access()
    with fronting([engine], access, limits) as front:
        with front.open() as away:
            name = away.until("session.created")["session"]["id"]
            away.frame(jpeg())
            away.until("input_frame.processed")
        session = front.front.sessions[name]
        until(lambda: session.socket is None, PATIENCE)  # the front knows that it is away
        with front.open() as first, front.open() as second:
            for client in (first, second):
                client.until("session.created")
            with front.open() as third:
                assert third.close_code == 1013
                words = third.socket.close_reason or ""
                assert "17 MiB are needed, and 0 bytes of the 34 MiB" in words
            assert access.accounts[0].ended["realtime", "refused"] == 1
            with front.open(query=f"?session={name}&last_seq=0") as again:
                assert again.close_code == 4404


def served(page: str) -> dict[str, set[str]]:
    """Names of a page of /metrics, and the labels that were seen on each."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        for end in ends.get(family.type, ("",)):
            found[family.name + end] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_what_the_dashboard_shows_is_served(front: Fronted) -> None:
    """With replicas all of it; without, all but what is about them."""
    chat(front, "nobody")  # of reasons there must be one
    headers = {"Authorization": f"Bearer {CHIEF}"}
    pages = [httpx.get(f"{front.http}/metrics", headers=headers, timeout=PATIENCE).text]
    alone = Replica(9, front.front.replicas[0].address, FRONT_KEY)
    pages.append(
        httpx.get(f"{alone.address}/metrics", headers=alone.authorization, timeout=PATIENCE).text
    )
    dashboard = json.loads((REPO / "inference/serve/dashboard.json").read_text())
    queries = [one["expr"] for panel in dashboard["panels"] for one in panel.get("targets", ())]
    queries += [one["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    assert len(queries) > 30
    names = {name for query in queries for name in re.findall(r"\bmoss_\w+", query)}
    both, one_server = map(served, pages)
    assert names - set(both) == set()
    assert {n for n in names if not n.startswith("moss_front_")} - set(one_server) == set()
    for query in queries:
        (name,) = re.findall(r"\bmoss_\w+", query)
        labels = set(re.findall(r"(\w+)=~?\"", query))
        for group in re.findall(r"by \(([^)]*)\)", query):
            labels |= set(group.replace(" ", "").split(","))
        assert labels <= both[name] or not both[name], query
    told = {name for name in both if name.startswith("moss_key_")}
    assert told - names == set()  # none that is not shown
