"""API keys: what each may do at once and in a minute, and what is written down of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve.access import Access
from inference.serve.audit import AuditLog
from inference.serve.keys import Key, read_keys
from inference.serve.limits import Limits
from tests.inference.serve import attacking
from tests.inference.serve.serving import Client, Running, audited, jpeg, serving, standing_still
from tests.waiting import PATIENCE, until

SECRET = "What colour is the door of the vault?"
FPS = 10  # of cameras
MINUTE = 60  # tokens of `reader` and `asker`


def secret(name: str) -> str:
    return f"key-of-{name}-0123"


KEYS = [
    Key(name="chief", key=secret("chief"), operator=True),
    Key(name="single", key=secret("single"), sessions=1),
    Key(name="live-camera", key=secret("live-camera"), frames_per_second=FPS),
    Key(name="file-camera", key=secret("file-camera"), frames_per_second=FPS),
    Key(name="reader", key=secret("reader"), tokens_per_minute=MINUTE),
    Key(name="asker", key=secret("asker"), tokens_per_minute=MINUTE),
    Key(name="plain", key=secret("plain")),
]


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=3)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def server(engine: Engine, log: Path) -> Iterator[Running]:
    access = Access(KEYS, audit=AuditLog(str(log), 10**6, 2))
    with serving(engine, Limits(fps=200), access=access) as running:
        yield running
    access.close()


def headers(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret(name)}"}


def connect(server: Running, name: str, query: str = "") -> Client:
    return server.open(query, additional_headers=headers(name))


def chat(server: Running, name: str, text: str = SECRET, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **fields}
    return server.post(json=body, headers=headers(name))


def value(server: Running, *names: str) -> float:
    """Of /metrics: by the name and the values of its labels."""
    page = server.get("/metrics", headers=headers("chief")).text
    found = [
        sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if {sample.name, *sample.labels.values()} == set(names)
    ]
    assert len(found) == 1, (names, found)
    return found[0]


def lines(log: Path, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Those of the audit log with these fields, once there are so many."""

    def found() -> list[dict[str, Any]]:
        return [one for one in audited(log) if fields.items() <= one.items()]

    until(lambda: len(found()) >= count)
    return found()


def test_a_key_has_so_many_sessions_and_requests_at_once(server: Running, log: Path) -> None:
    began = time.monotonic()
    with connect(server, "single") as first:
        name = first.until("session.created")["session"]["id"]
        with connect(server, "single") as second:
            error = second.next()
            assert (error["type"], error["error"]["code"]) == ("error", "rate_limit_exceeded")
            assert "1 sessions and requests are open, of 1" in error["error"]["message"]
            assert second.close_code == 1013
        client = openai.OpenAI(
            base_url=f"{server.http}/v1", api_key=secret("single"), max_retries=0
        )
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(
                model="moss-video", messages=[{"role": "user", "content": "A"}]
            )
        assert refused.value.code == "rate_limit_exceeded"
        assert refused.value.response.headers["Retry-After"] == "1"
        with connect(server, "plain", f"?session={name}&last_seq=0") as thief:
            assert thief.close_code == 4404  # not its session
        first.frame(jpeg())
        first.until("input_frame.processed")
        first.send("session.close")
        usage = first.until("session.closed")["usage"]
    (line,) = lines(log, 1, key="single", kind="realtime", ended="done")
    counts = ("frames", "input_tokens", "output_tokens")
    assert [line["usage"][name] for name in counts] == [usage[name] for name in counts]
    assert (line["id"], line["code"], line["asked"]["source"]) == (name, 1000, "live")
    assert usage["seconds"] - 0.01 < line["usage"]["seconds"] < time.monotonic() - began
    assert [one["kind"] for one in lines(log, 2, key="single", ended="refused")] == [
        "realtime",
        "chat",
    ]
    assert chat(server, "single").status_code == 200


def test_tokens_beyond_a_minutes_must_come_back_first(server: Running) -> None:
    """The wait is what follows from the usage that the answer tells."""
    began, used, answer = time.monotonic(), 0, chat(server, "reader")
    while answer.status_code == 200:
        used += answer.json()["usage"]["total_tokens"]
        assert used < 10 * MINUTE
        answer = chat(server, "reader")
    assert answer.status_code == 429
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    longest = math.ceil((used - MINUTE + 1) / (MINUTE / 60))
    least = longest - (time.monotonic() - began) * MINUTE / 60 - 1
    assert least <= int(answer.headers["Retry-After"]) <= longest
    assert chat(server, "plain").status_code == 200


def test_a_session_may_not_ask_when_the_tokens_of_its_key_are_used_up(server: Running) -> None:
    with connect(server, "asker") as client, connect(server, "asker") as file:
        for one in (client, file):
            one.until("session.created")
        file.update(source="file")
        client.update(max_output_tokens=4, silence_bias=-50, instructions="word " * 12)
        client.ask("A")
        client.until("response.done")
        time.sleep(0.15)  # used tokens are read again after a moment
        client.ask("B")
        error = client.until("error")
        assert error["code"] == "rate_limit_exceeded"
        assert f"more than {MINUTE} tokens per minute" in error["message"]
        for one in (client, file):
            one.frame(jpeg())
        assert file.until("error")["code"] == "rate_limit_exceeded"  # it would wait for long
        for one in (client, file):
            one.send("session.close")
            one.rest()
    dropped = [e["reason"] for e in client.seen if e["type"] == "input_frame.dropped"]
    assert dropped == ["rate_limited"]


@pytest.mark.parametrize("source", ["live", "file"])
def test_all_sessions_of_a_key_share_its_frames_per_second(server: Running, source: str) -> None:
    """A live source's are dropped, a file's wait. At once two seconds' may come."""
    count, key, began = 3 * FPS // 2, f"{source}-camera", time.monotonic()
    with connect(server, key) as one, connect(server, key) as two:
        for client in (one, two):
            client.until("session.created")
            client.update(source=source, silence_bias=100)
            for second in range(count):
                client.frame(jpeg(), ts=float(second))
            client.send("input_image_buffer.end")
        for client in (one, two):
            client.rest()
        seconds = time.monotonic() - began
    told = [event for client in (one, two) for event in client.seen]
    limited = sum(
        e["count"]
        for e in told
        if e["type"] == "input_frame.dropped" and e["reason"] == "rate_limited"
    )
    may = 2 * FPS + FPS * seconds
    if source == "live":
        assert 2 * count - may - 1 <= limited <= 2 * count - 2 * FPS
        assert value(server, "moss_key_refused_total", key, "frames_per_second") == limited
    else:
        assert limited == 0
        assert 2 * count <= may
        assert sum(e["type"] == "input_frame.processed" for e in told) == 2 * count


def test_a_session_that_cannot_be_opened_counts_no_more(
    server: Running, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(server.hub, "open", broken)
    with connect(server, "chief") as client:
        assert client.close_code != 1000
    assert lines(log, 1, key="chief", ended="failed")[0]["code"] == 1011
    assert value(server, "moss_key_open", "chief") == 0


def test_what_a_key_uses_is_counted(server: Running, engine: Engine, log: Path) -> None:
    def now() -> list[float]:
        return [value(server, "moss_key_tokens_total", "plain", way) for way in ("input", "output")]

    before = now()
    usage = chat(server, "plain", n=2).json()["usage"]
    asked = {"messages": [{"role": "user", "content": SECRET}], "stream": True, "max_tokens": 400,
             "ignore_eos": True}  # fmt: skip
    with standing_still(engine, steps=12):
        with httpx.stream(
            "POST", f"{server.http}/v1/chat/completions", json=asked, headers=headers("plain"),
            timeout=PATIENCE,
        ) as answer:  # fmt: skip
            said = (line for line in answer.iter_lines() if line.startswith("data: "))
            for _ in range(4):  # its role, then what is said
                next(said)
            (running,) = server.hub.runner._running
        until(lambda: running.closing)
    (left,) = lines(log, 1, key="plain", ended="client_left")
    assert left["asked"]["stream"]
    more = [left["usage"][f"{way}_tokens"] for way in ("input", "output")]
    expected = [usage["prompt_tokens"] + more[0], usage["completion_tokens"] + more[1]]
    assert [b - a for a, b in zip(before, now(), strict=True)] == expected
    assert more[0] == usage["prompt_tokens"]
    assert value(server, "moss_key_open", "plain") == 0
    assert value(server, "moss_key_limit", "file-camera", "frames_per_second") == FPS
    assert value(server, "moss_key_ended_total", "plain", "chat", "client_left") == 1
    assert value(server, "moss_key_seconds_total", "plain") > 0


def test_an_answer_that_nobody_waits_for_has_not_failed(
    server: Running, engine: Engine, log: Path
) -> None:
    """Not a stream: its client leaves while it is made."""
    body = {"messages": [attacking.USER], "max_tokens": 400, "ignore_eos": True}
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: {server.host}\nContent-Length: {len(text)}"
    head += f"\nContent-Type: application/json\nAuthorization: {headers('chief')['Authorization']}"
    with standing_still(engine):
        with attacking.raw(server, f"{head}\n\n", text):
            server.wait(1)
            (running,) = server.hub.runner._running
        until(lambda: running.closing)
    (left,) = lines(log, 1, key="chief", kind="chat")
    assert (left["ended"], left["code"], left["asked"]["max_tokens"]) == ("client_left", 499, 400)


def test_only_an_operator_reads_what_is_told_of_all_keys(server: Running) -> None:
    for name, status in (("chief", 200), ("plain", 401), ("nobody", 401)):
        assert server.get("/metrics", headers=headers(name)).status_code == status
    assert server.get("/v1/models", headers=headers("plain")).status_code == 200


def test_the_audit_log_has_neither_contents_nor_keys(server: Running, log: Path) -> None:
    assert chat(server, "nobody").status_code == 401
    assert chat(server, "plain", temprature=SECRET).status_code == 400
    (wrong,) = lines(log, 1, key="plain", ended="refused")
    assert wrong["code"] == "unknown_field"
    assert lines(log, 1, key=None)[-1]["code"] == "unauthorized"
    text = log.read_text()
    assert SECRET not in text
    assert "vault" not in text
    assert not [key.name for key in KEYS if key.key in text]
    until(lambda: value(server, "moss_audit_lines_total") == len(log.read_text().splitlines()))


WRONG = [
    ("keys: [{name: a, key: 'secret-1'", "is not YAML"),
    ("keys: []", "keys: "),
    ("- a", "KeyFile: "),
    ("keys: [{name: a}]", "keys[0].key: Field required"),
    ("keys: [{name: 'a b', key: secret-1}]", "keys[0].name: up to 64 letters"),
    ("keys: [{name: a, key: 'secret 1'}]", "keys[0].key: 8 to 512 signs"),
    ("keys: [{name: a, key: secret-1, sessions: 0}]", "keys[0].sessions: "),
    ("keys: [{name: a, key: secret-1, frames_per_second: fast}]", "keys[0].frames_per_second: "),
    ("keys: [{name: a, key: secret-1, tokens: 5}]", "keys[0].tokens: "),
    ("keys: [{name: a, key: secret-1}, {name: a, key: secret-2}]", "keys[1].name: is that of"),
    ("keys: [{name: a, key: secret-1}, {name: b, key: secret-1}]", "keys[1].key: is that of"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_a_wrong_file_of_keys_is_refused_and_tells_none(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--keys") as wrong:
        read_keys(str(path))
    assert words.removeprefix("KeyFile: ") in str(wrong.value)
    assert "secret" not in str(wrong.value)


def test_a_file_of_keys_is_read_as_yaml_and_as_json(tmp_path: Path) -> None:
    given = [{"name": "a", "key": "secret-1", "sessions": 2}, {"name": "b", "key": "secret-2"}]
    for name, text in (
        ("keys.json", json.dumps({"keys": given}, indent="\t")),
        ("keys.yaml", "keys:\n- {name: a, key: secret-1, sessions: 2}\n- {name: b, key: secret-2}"),
    ):
        (tmp_path / name).write_text(text)
        read = read_keys(str(tmp_path / name))
        assert [key.model_dump(exclude_defaults=True) for key in read] == given
    with pytest.raises(ValueError, match="No such file"):
        read_keys(str(tmp_path / "none.yaml"))


def test_an_audit_log_begins_new_files_and_keeps_some(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"cut off')
    audit = AuditLog(str(path), 100, 2)
    for number in range(40):
        audit.write({"number": number})
    audit.close()
    files = [path, *(path.with_name(f"audit.jsonl.{n}") for n in (1, 2))]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    written = [json.loads(line) for file in reversed(files) for line in file.open()]
    assert [one["number"] for one in written] == list(range(40 - len(written), 40))
    assert len(written) > 8
    assert all(file.stat().st_size <= 100 for file in files)


def test_a_log_that_cannot_be_written_is_refused_at_the_start_and_never_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="No such file or directory"):
        AuditLog(str(tmp_path / "none" / "audit.jsonl"), 100, 2)
    path = tmp_path / "audit.jsonl"
    path.symlink_to("/dev/full")
    audit = AuditLog(str(path), 10**6, 2)
    for number in range(3):
        audit.write({"number": number})
    until(lambda: audit.lost == 3)
    assert len(caplog.records) == 1  # said once
    path.unlink()
    audit.write({"number": 3})
    audit.close()
    assert [json.loads(line) for line in path.open()] == [{"number": 3}]
    assert (audit.written, audit.lost) == (1, 3)
