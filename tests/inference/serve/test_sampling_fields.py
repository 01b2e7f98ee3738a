"""What a chat request asks of the choice of tokens, and of when they end: through a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference.engine.load import load_engine
from inference.serve.limits import Limits
from inference.session.detokenize import special_tokens, token_bytes
from tests.inference.serve.serving import Running, serving


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", max_tokens=512, max_sessions=2)
    with serving(engine, Limits(max_tokens=40), stage="sft") as running:
        yield running


def ask(server: Running, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "A"}], "max_tokens": 4, **fields}
    return server.post(json=body)


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def refused(answer: httpx.Response) -> str:
    """The field that the error names."""
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["param"])


def counted(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def tokens_of(server: Running, answer: httpx.Response) -> list[int]:
    """Of an answer with log-probabilities."""
    assert answer.status_code == 200, answer.text
    tokenizer = server.hub.runner.vocabulary.tokenizer
    special = special_tokens(tokenizer)
    known = dict[tuple[str, bytes], int]()
    for number in range(tokenizer.get_vocab_size()):
        written = token_bytes(tokenizer, number)
        said = b"" if number in special else written
        known[written.decode("utf-8", "replace"), said] = number
    entries = answer.json()["choices"][0]["logprobs"]["content"]
    return [known[one["token"], bytes(one["bytes"])] for one in entries]


def test_an_answer_is_as_long_as_is_asked_for(server: Running) -> None:
    """Its first token ends it, where `min_tokens` does not forbid that."""
    first = tokens_of(server, ask(server, logprobs=True))[0]
    silence = server.hub.runner.engine.silence_token
    for ending, options in (
        (silence, {"silence_bias": 100}), (first, {"stop_token_ids": [first]}),
    ):  # fmt: skip
        assert counted(ask(server, **options)) == 0
        longer = ask(server, **options, min_tokens=3, logprobs=True)
        assert 3 <= counted(longer) <= 4
        assert ending not in tokens_of(server, longer)
    kept = ask(server, stop_token_ids=[first], include_stop_str_in_output=True, logprobs=True)
    assert tokens_of(server, kept) == [first]
    assert kept.json()["choices"][0]["finish_reason"] == "stop"
    plain = ask(server, max_tokens=30)
    early, late = said(plain)[:1], ask(server, max_tokens=30, stop=said(plain)[:1], min_tokens=6)
    assert counted(ask(server, max_tokens=30, stop=early)) < 6 < counted(late)
    assert said(late).startswith(said(ask(server, max_tokens=6)))


def test_tokens_are_chosen_as_is_asked_for(server: Running) -> None:
    plain = tokens_of(server, ask(server, max_tokens=12, logprobs=True))
    first = plain[0]
    forbidden = ask(server, logprobs=True, logit_bias={str(first): -100})
    assert tokens_of(server, forbidden)[0] != first
    forced = ask(server, logprobs=True, logit_bias={"40": 100})
    assert tokens_of(server, forced) == [40] * 4
    both = ask(server, logprobs=True, max_tokens=12, logit_bias={"40": 100, "41": 99.5},
               frequency_penalty=1)  # fmt: skip
    assert sorted(tokens_of(server, both)) == [40] * 6 + [41] * 6
    sharp = ask(server, max_tokens=12, temperature=5, min_p=1, seed=1)
    assert said(sharp) == said(ask(server, max_tokens=12))
    size = server.hub.runner.engine.config.text_config.vocab_size
    for field, value in (("logit_bias", {str(size): 1}), ("stop_token_ids", [size])):
        assert refused(ask(server, **{field: value})) == field
