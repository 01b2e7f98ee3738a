"""Answers that follow a schema, several at once, and with log-probabilities: OpenAI's client."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import jsonschema
import openai
import pytest
from openai.types import chat
from openai.types.chat.completion_create_params import CompletionCreateParams
from pydantic import BaseModel

from inference.engine.load import load_engine
from inference.serve.requests import (
    Answer,
    ChatRequest,
    ImagePart,
    Message,
    StreamOptions,
    TextPart,
)
from tests.inference.serve.openai_client import openai_client
from tests.inference.serve.serving import Running, serving

USER: Any = [{"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=512, max_sessions=3)
    with serving(engine, stage="sft") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    yield from openai_client(server)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    settings = {"model": "moss-video", "max_tokens": 12, "messages": USER, **options}
    return client.chat.completions.create(**settings)


ITSELF = {"$ref": "#/properties/a"}


def schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def refused(client: openai.OpenAI, **options: Any) -> str:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **options)
    assert f"{error.value.param}: " in error.value.message
    return str(error.value.param)


def fields_of(given: Any) -> set[str]:
    """Of a TypedDict, or of all those of a union."""
    parts = get_args(given)
    return set().union(*map(fields_of, parts)) if parts else set(given.__annotations__)


def test_each_field_of_openais_client_is_known_by_its_name() -> None:
    """Done, without effect, or refused with a reason: never a field that is not there."""
    for theirs, ours in (
        (CompletionCreateParams, ChatRequest),
        (chat.ChatCompletionUserMessageParam, Message),
        (chat.ChatCompletionDeveloperMessageParam, Message),
        (chat.ChatCompletionAssistantMessageParam, Answer),
        (chat.ChatCompletionContentPartTextParam, TextPart),
        (chat.ChatCompletionContentPartImageParam, ImagePart),
        (chat.ChatCompletionStreamOptionsParam, StreamOptions),
    ):
        assert fields_of(theirs) - set(ours.names()) == set(), theirs


# Schemas


class Person(BaseModel, extra="forbid"):
    name: Literal["Ann", "Bob"]
    age: Literal[1, 20, 300]
    tall: bool


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "where": {"enum": ["left", "right"]},
        "seconds": {"type": "array", "items": {"enum": [7, 12, -4]}, "minItems": 1, "maxItems": 2},
        "said": {"type": "string", "maxLength": 4},
    },
    "required": ["where", "seconds", "said"],
    "additionalProperties": False,
}


def test_an_answer_is_json_of_its_schema(client: openai.OpenAI) -> None:
    """The model has random weights: nothing but the grammar makes these texts."""
    for seed in range(3):
        options = {"response_format": schema_of(SCHEMA), "temperature": 1.2, "seed": seed}
        choice = ask(client, max_tokens=300, **options).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)


@pytest.mark.parametrize("spelled", ["<|eot_id|>", "<|image|>", "<|silence|>", "a <|video|> b"])
def test_a_special_token_that_a_schema_spells_is_text(client: openai.OpenAI, spelled: str) -> None:
    schema = {
        "type": "object",
        "properties": {spelled: {"enum": [spelled]}, "c": {"const": f"{spelled}{spelled}"}},
        "required": [spelled, "c"],
        "additionalProperties": False,
    }
    choice = ask(client, max_tokens=200, response_format=schema_of(schema)).choices[0]
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content) == {spelled: spelled, "c": f"{spelled}{spelled}"}


def test_the_client_parses_an_answer_into_its_own_type(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="moss-video", messages=USER, max_tokens=200, response_format=Person
    )
    assert isinstance(answer.choices[0].message.parsed, Person)
    pieces = ask(
        client, max_tokens=200, response_format=schema_of(Person.model_json_schema()), stream=True
    )
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert said == answer.choices[0].message.content


def test_a_json_object_is_one_and_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    for seed in range(2):
        options = {"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": seed}
        choice = ask(client, max_tokens=30, **options).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.lstrip()[:1] == "{"
    cut = ask(client, max_tokens=3, response_format=schema_of(SCHEMA)).choices[0]
    assert cut.finish_reason == "length"
    assert ask(client, response_format={"type": "text"}).choices == ask(client).choices


def named(number: int) -> dict[str, Any]:
    name = f"p{number}"
    return {"type": "object", "properties": {name: {"pattern": f"a{number}"}}, "required": [name]}


WRONG_FORMATS: list[tuple[dict[str, Any], str]] = [
    (schema_of({"type": "nonsense"}), "response_format"),
    (schema_of({"not": {"type": "string"}}), "response_format"),
    (schema_of({"$ref": "file:///etc/passwd"}), "response_format"),
    (schema_of({"type": "string", "pattern": "("}), "response_format"),
    (schema_of({"$ref": "#"}), "response_format"),
    (schema_of({"type": "object", "properties": {"a": ITSELF}}), "response_format"),
    (schema_of({"const": "x" * 2**16}), "response_format"),
    (schema_of({"anyOf": [named(n) for n in range(1000)]}), "response_format"),
    ({"type": "json_schema"}, "response_format.json_schema"),
    ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
    ({"type": "text", "json_schema": {"schema": {}}}, "response_format.json_schema"),
    ({"type": "grammar"}, "response_format.type"),
]


def test_formats_that_cannot_be_followed_are_refused(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, field in WRONG_FORMATS:
        assert refused(client, response_format=given) == field
    hard = {"type": "string", "pattern": "^(a?){500}a{500}$"}  # fails after a few tokens
    assert refused(client, response_format=schema_of(hard), max_tokens=40) == "response_format"
    more = {"ignore_eos": True}
    assert refused(client, response_format=schema_of(SCHEMA), extra_body=more) == "ignore_eos"
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="needs the package llguidance"):
        ask(client, response_format=schema_of(SCHEMA))


# Several answers


def test_answers_of_one_request_are_those_of_requests_of_their_own(client: openai.OpenAI) -> None:
    """The first has the request's seed, each of the others the next one."""
    together = ask(client, n=3, temperature=1.3, seed=2**63 - 2)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    alone = [ask(client, temperature=1.3, seed=s) for s in (2**63 - 2, 2**63 - 1, -(2**63))]
    texts = [one.choices[0].message.content for one in alone]
    assert [choice.message.content for choice in together.choices] == texts
    assert len(set(texts)) == 3
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert together.usage.completion_tokens == sum(o.usage.completion_tokens for o in alone)
    pieces = ask(client, n=3, temperature=1.3, seed=2**63 - 2, stream=True,
                 stream_options={"include_usage": True})  # fmt: skip
    said, ends = [""] * 3, [None] * 3
    for piece in pieces:
        for choice in piece.choices:
            said[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert (said, piece.usage) == (texts, together.usage)
    assert ends == [choice.finish_reason for choice in together.choices]


def test_more_answers_than_places_are_refused(client: openai.OpenAI, server: Running) -> None:
    for count in (0, 4, 9, 1.5, True):
        assert refused(client, n=count) == "n"
    server.wait(0)


# Log-probabilities


def test_logprobs_are_those_of_what_was_said(client: openai.OpenAI, server: Running) -> None:
    """With the whole text in one more request, the next token's are found at the end."""
    answer = ask(client, logprobs=True, top_logprobs=4)
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens == 12
    said = b"".join(bytes(entry.bytes) for entry in content)
    assert said.decode("utf-8", "replace").startswith(choice.message.content)
    for entry in content:
        best = entry.top_logprobs
        assert len(best) == 4
        assert (best[0].token, best[0].logprob) == (entry.token, entry.logprob)  # greedy
        assert [b.logprob for b in best] == sorted((b.logprob for b in best), reverse=True)
        assert sum(math.exp(b.logprob) for b in best) < 1.0001
    plain = ask(client)
    assert plain.choices[0].logprobs is None
    assert plain.choices[0].message == choice.message
    drawn = ask(client, temperature=2.0, seed=1, logprobs=True)
    tokens = drawn.choices[0].logprobs.content
    assert all(entry.logprob < 0 and entry.top_logprobs == [] for entry in tokens)


def test_a_streams_logprobs_are_the_same_and_stop_with_the_text(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "max_tokens": 30}
    whole = ask(client, **options).choices[0]

    def streamed(**more: Any) -> tuple[str, list[Any]]:
        text, entries = "", list[Any]()
        for piece in ask(client, **options, **more, stream=True):
            choice = piece.choices[0]
            text += choice.delta.content or ""
            entries += choice.logprobs.content if choice.logprobs else []
        return text, entries

    assert streamed() == (whole.message.content, whole.logprobs.content)
    stop = whole.message.content[10:13]
    cut = ask(client, **options, stop=stop).choices[0]
    entries = cut.logprobs.content
    assert streamed(stop=stop) == (cut.message.content, entries)
    assert entries == whole.logprobs.content[: len(entries)]
    begun = b"".join(bytes(entry.bytes) for entry in entries[:-1]).decode("utf-8", "replace")
    assert len(begun) <= len(cut.message.content) < len(whole.message.content)


def test_wrong_logprobs_are_refused(client: openai.OpenAI) -> None:
    assert refused(client, top_logprobs=2) == "top_logprobs"
    assert refused(client, logprobs=True, top_logprobs=21) == "top_logprobs"
    assert refused(client, logprobs="yes") == "logprobs"
