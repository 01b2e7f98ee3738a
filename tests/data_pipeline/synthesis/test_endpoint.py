"""Requests to a real server that fails in every way that servers do."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_pipeline.synthesis.config import EndpointConfig
from data_pipeline.synthesis.endpoint import SEEDS, Endpoint, EndpointError, RequestFailed
from data_pipeline.synthesis.model import vote
from data_pipeline.synthesis.prompts import load_prompts

Answer = tuple[int, str, dict[str, str]]  # status, body, headers


def completion(text: str, finish: str = "stop") -> Answer:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, json.dumps({"choices": [choice], "usage": usage}), {}


GOOD = completion('{"same": true}')


@contextmanager
def server(*answers: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of one that gives these answers in turn, the last one for ever; what it was asked."""
    asked: list[dict[str, Any]] = []
    turns = itertools.chain(answers, itertools.repeat(answers[-1]))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"at": time.monotonic(), "key": self.headers["Authorization"]})
            status, text, headers = next(turns)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(text))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", asked
        running.shutdown()


def ask(
    url: str, kind: str = "same", **options: Any
) -> tuple[Any, tuple[int, int], list[tuple[int, int]]]:
    """A reply, its tokens, and those that were wasted."""
    config = EndpointConfig(url=url, model="m", **{"backoff": 0.0, "retries": 3, **options})
    wasted: list[tuple[int, int]] = []

    async def work() -> tuple[Any, tuple[int, int]]:
        endpoint = Endpoint(config, lambda _, tokens: wasted.append(tokens))
        try:
            data = {"question": "?", "answers": ["a", "b"]}
            return await endpoint.ask(load_prompts().request(kind, data, config, seed=5))
        finally:
            await endpoint.close()

    return *asyncio.run(work()), wasted


def test_a_request_has_a_schema_a_seed_and_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    with server(GOOD) as (url, asked):
        assert ask(url, api_key_env="SOME_KEY") == ({"same": True}, (7, 3), [])
        assert ask(url, text_model="writes")[0] == {"same": True}
    body, other = asked
    assert (other["model"], other["key"]) == ("writes", None)
    assert body["key"] == "Bearer secret"
    assert (body["model"], body["seed"], body["max_tokens"]) == ("m", 5, 1024)
    assert body["response_format"]["json_schema"]["name"] == "same"
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["same"]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_work_later_is_tried_again_after_the_time_that_is_asked_for(status: int) -> None:
    with server((status, "busy", {"Retry-After": "0.3"}), GOOD) as (url, asked):
        assert ask(url)[0] == {"same": True}
    assert asked[1]["at"] - asked[0]["at"] >= 0.3
    assert asked[1]["seed"] == asked[0]["seed"]


def test_a_server_that_asks_for_hours_is_named_and_asked_after_the_longest_pause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with server((429, "quota", {"Retry-After": "7200"}), GOOD) as (url, asked):
        assert ask(url, max_wait=0.3)[0] == {"same": True}
    assert asked[1]["at"] - asked[0]["at"] >= 0.3
    said = f"{url} asks to wait for 7200 s: it is asked again after 0 s (max_wait)"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_reply_that_cannot_be_used_is_paid_for_and_asked_for_with_another_seed() -> None:
    answers = completion('{"same": tr', "length"), completion('{"same": 3}'), completion("no"), GOOD
    with server(*answers) as (url, asked):
        assert ask(url) == ({"same": True}, (7, 3), [(7, 3)] * 3)
    assert [body["seed"] for body in asked] == [5 + SEEDS * n for n in range(4)]
    assert [body["max_tokens"] for body in asked] == [1024, 2048, 2048, 2048]


def test_a_reply_with_half_a_surrogate_pair_is_asked_for_again() -> None:
    """JSON spells it; neither the stored replies nor a shard have bytes for it."""
    half, whole = (rf'{{"speak": true, "text": "a {end}"}}' for end in (r"\ud83d", r"\ud83d\ude00"))
    with server(completion(half), completion(whole)) as (url, asked):
        wanted = {"speak": True, "text": "a \N{GRINNING FACE}"}
        assert ask(url, "say") == (wanted, (7, 3), [(7, 3)])
    assert [body["seed"] for body in asked] == [5, 5 + SEEDS]


def test_a_server_without_json_schema_is_asked_in_other_forms() -> None:
    refused: Answer = 400, "response_format.type is not supported", {}
    fenced = completion('Here it is:\n```json\n{"same": false}\n```')
    with server(refused, refused, fenced) as (url, asked):
        assert ask(url)[0] == {"same": False}
    forms = [body.get("response_format", {}).get("type") for body in asked]
    assert forms == ["json_schema", "json_object", None]
    assert '"required": ["same"]' in asked[2]["messages"][1]["content"]


def test_retries_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with server((500, "down", {})) as (url, asked), pytest.raises(RequestFailed, match="4 tries"):
        ask(url)
    assert len(asked) == 4
    with server((400, "too long", {})) as (url, asked), pytest.raises(RequestFailed, match="long"):
        ask(url)
    assert len(asked) == 1


def test_what_can_never_work_ends_the_run_at_once() -> None:
    with (
        server((401, "bad key", {})) as (url, asked),
        pytest.raises(EndpointError, match="bad key"),
    ):
        ask(url)
    assert len(asked) == 1
    with pytest.raises(EndpointError, match="start the server or correct the URL"):
        ask("http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("votes", "verdict", "asked"),
    [
        ("yyy", True, 3), ("nnn", False, 3), ("yynyy", True, 5), ("nynynnn", False, 7),
        ("ynynynynyn", None, 9),
    ],
)  # fmt: skip
def test_a_vote_ends_when_one_leads_by_three(votes: str, verdict: bool | None, asked: int) -> None:
    seen: list[int] = []

    async def one(number: int) -> bool:
        seen.append(number)
        await asyncio.sleep(0.001 * (-number % 4))  # replies come in any order
        return votes[number] == "y"

    assert asyncio.run(vote(one, 3, 9)) is verdict
    assert sorted(seen) == list(range(asked))
