"""Tools of chat requests: prompts as those of imported samples, calls as OpenAI's client reads
them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from data_pipeline.importers.conversation import conversation_draft
from inference.engine.load import load_engine
from inference.serve.limits import Limits, Refused
from inference.serve.protocol import read_json
from inference.serve.question import read_question
from inference.serve.requests import ChatRequest
from inference.serve.tools import Call, CallReader, in_order
from inference.serve.typed_fields import read
from tests.inference.serve.openai_client import openai_client
from tests.inference.serve.serving import Running, serving

USER = {"role": "user", "content": "Is it red or green?"}
COLOUR = {
    "$defs": {"Colour": {"enum": ["red", "green"]}},
    "type": "object",
    "properties": {"colour": {"$ref": "#/$defs/Colour"}},
    "required": ["colour"],
    "additionalProperties": False,
}
NOTHING = {"properties": {}, "additionalProperties": False}
TOOLS: Any = [
    {"type": "function",
     "function": {"name": "show", "description": "Shows it.", "parameters": COLOUR}},
    {"type": "function", "function": {"name": "hide", "parameters": NOTHING}},
]  # fmt: skip
SHOW = {"type": "function", "function": {"name": "show"}}


def called(number: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def result(number: int, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "I look.",
     "tool_calls": [called(1, "show", '{"colour": "red"}'), called(2, "hide", "{}")]},
    result(1, "shown"),
    result(2, [{"type": "text", "text": "hidden, é"}]),
    {"role": "assistant", "content": None, "tool_calls": [called(3, "show", "{broken")]},
    result(3, "error"),
    {"role": "assistant", "content": "It is red."},
    USER,
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", window=8, max_tokens=1024, max_sessions=2)
    with serving(engine, stage="sft") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    yield from openai_client(server)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    settings = {"model": "moss-video", "max_tokens": 80, "messages": [USER], **options}
    return client.chat.completions.create(**settings)


def question(messages: list[dict[str, Any]], **fields: Any) -> Any:
    return read_question({"messages": messages, **fields}, Limits())


def test_a_history_with_tools_is_read_as_an_imported_sample_is() -> None:
    record = {"messages": HISTORY, "tools": TOOLS}
    wanted = [(turn["role"], turn["content"]) for turn in conversation_draft(record, "").messages]
    made = question(HISTORY, tools=TOOLS)
    assert [(turn.role, turn.content) for turn in made.messages] == wanted
    assert wanted[0] == ("system", json.dumps(TOOLS))
    assert wanted[3][1] == (
        'I look.\n{"name": "show", "arguments": {"colour": "red"}}\n'
        '{"name": "hide", "arguments": {}}'
    )
    assert wanted[5] == ("user", "hidden, é")


def test_marks_of_other_providers_clients_change_nothing() -> None:
    """What LiteLLM, OpenRouter and Anthropic's clients add to messages, and send back with them."""
    mark = {"cache_control": {"type": "ephemeral"}}
    own = {"provider_specific_fields": {"refusal": None}}
    user = {"role": "user", "content": [{"type": "text", "text": "A"}]}
    call = called(1, "f", "{}")
    answer: dict[str, Any] = {"role": "assistant", "content": "x", "tool_calls": [call]}
    marked: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "A", **mark}]},
        {**answer, **own, "reasoning_details": [], "tool_calls": [{**call, **own}]},
        {**result(1, "4"), **mark},
    ]
    tool = {"type": "function", "function": {"name": "f"}}
    plain = question([user, answer, result(1, "4")], tools=[tool]).messages
    assert question(marked, tools=[{**tool, **mark}]).messages == plain


def test_results_of_calls_stand_in_the_order_of_the_calls() -> None:
    turned = [*HISTORY[:3], HISTORY[4], HISTORY[3], *HISTORY[5:]]
    assert question(turned).messages == question(HISTORY).messages


def test_an_error_in_a_result_names_the_message_of_the_request() -> None:
    wrong = result(1, [{"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}])
    with pytest.raises(Refused) as error:
        question([*HISTORY[:3], HISTORY[4], wrong])
    assert error.value.field == "messages[4].content[0].image_url"


def test_many_results_are_put_in_order_at_once() -> None:
    """Within a request's limits: seconds for which other requests waited, when each was searched
    for among all calls."""
    count = 12_000
    calls = [{"id": str(n), "function": {"name": "f"}} for n in range(count)]
    results = [{"role": "tool", "tool_call_id": str(n), "content": ""} for n in range(count)]
    turns = [USER, {"role": "assistant", "tool_calls": calls}, *reversed(results)]
    asked = read(ChatRequest, {"messages": turns}, Limits())
    began = time.process_time()
    numbers = [number for number, _ in in_order(asked.messages)]
    assert time.process_time() - began < 1
    assert numbers == [0, 1, *range(count + 1, 1, -1)]


def test_arguments_that_no_parser_reads_are_text() -> None:
    deep = "[" * 3000 + "]" * 3000
    turns: Any = [USER, {"role": "assistant", "tool_calls": [called(1, "show", deep)]}, USER]
    said = question(turns).messages[1].content
    assert said == json.dumps({"name": "show", "arguments": deep})


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a": ', "}")])
def test_json_is_read_to_128_levels(opening: str, closing: str) -> None:
    """What reads tools and schemas level by level would end in a RecursionError."""
    deep = {count: opening * count + "1" + closing * count for count in (128, 129, 900)}
    assert json.dumps(read_json(deep[128], "it", 10**6)) == deep[128]
    for count in (129, 900):
        with pytest.raises(Refused, match=r"^it is nested more than 128 deep$"):
            read_json(deep[count], "it", 10**6)


def test_half_characters_of_json_stay_escaped() -> None:
    """A model may say one in a call, and clients send it back."""
    arguments = '{"a": "é \\ud83d"}'
    (call,) = CallReader(["show"]).append(f'{{"name": "show", "arguments": {arguments}}}')
    assert isinstance(call, Call)
    assert call.arguments == arguments
    tools = json.loads(json.dumps(TOOLS).replace("Shows it.", "\\ud83d"))
    turns: Any = [USER, {"role": "assistant", "tool_calls": [called(1, "show", arguments)]}, USER]
    messages = question(turns, tools=tools).messages
    assert '"description": "\\ud83d"' in messages[0].content
    assert messages[2].content == f'{{"name": "show", "arguments": {arguments}}}'


def test_an_empty_answer_at_the_end_is_no_question_for_tools() -> None:
    with pytest.raises(Refused) as error:
        question([{"role": "assistant", "content": ""}], tools=TOOLS)
    assert error.value.field == "messages"


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    none = question([USER], tools=TOOLS, tool_choice="none")
    assert (none.messages, none.tools, none.schema) == (question([USER]).messages, None, None)
    named = question([USER], tools=TOOLS, tool_choice=SHOW)
    assert named.messages == question([USER], tools=TOOLS).messages
    assert list(named.tools.schemas) == ["show"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", SHOW], ids=["any", "named"])
def test_a_call_that_is_asked_for_comes(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    """Whatever the model is: this one has random weights. Several seeds call several ways."""
    seen = set()
    for seed in range(4):
        options = {"tools": TOOLS, "tool_choice": choice, "temperature": 2.0, "seed": seed}
        settings: Any = {"model": "moss-video", "max_tokens": 80, "messages": [USER], **options}
        if stream:
            with client.chat.completions.stream(**settings) as events:
                answer: Any = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**settings)
        (one,) = answer.choices
        (call,) = one.message.tool_calls
        assert (one.finish_reason, one.message.content or None) == ("tool_calls", None)
        schema = {"show": COLOUR, "hide": NOTHING}[call.function.name]
        jsonschema.validate(json.loads(call.function.arguments), schema)
        seen.add((call.function.name, call.function.arguments))
        # What was called goes back as it came, with its result.
        turn = {"role": "assistant", "tool_calls": [call.model_dump(exclude_none=True)]}
        back = {"role": "tool", "tool_call_id": call.id, "content": "done"}
        ask(client, messages=[USER, turn, back], tools=TOOLS, max_tokens=2)
    assert len(seen) > 1
    assert choice == "required" or {name for name, _ in seen} == {"show"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_told_as_one(client: openai.OpenAI, stream: bool) -> None:
    """As by OpenAI's API: clients see the call that was begun, and that it has no end."""
    settings: Any = {"tools": TOOLS, "tool_choice": SHOW, "seed": 1, "temperature": 2.0}
    whole = ask(client, **settings)
    (call,) = whole.choices[0].message.tool_calls
    tokens = whole.usage.completion_tokens
    cut = ask(client, **settings, max_tokens=tokens - 4, stream=stream)
    if stream:
        choices = [piece.choices[0] for piece in cut]
        calls = [one.delta.tool_calls[0] for one in choices if one.delta.tool_calls]
        texts, reason = [one.delta.content for one in choices], choices[-1].finish_reason
    else:
        message, reason = cut.choices[0].message, cut.choices[0].finish_reason
        calls, texts = message.tool_calls, [message.content]
    (part,) = calls
    assert (reason, "".join(filter(None, texts))) == ("length", "")
    assert part.function.name == "show"
    assert part.function.arguments != call.function.arguments
    assert call.function.arguments.startswith(part.function.arguments)
    early = ask(client, **settings, max_tokens=3)
    assert (early.choices[0].finish_reason, early.choices[0].message.tool_calls) == ("length", None)


def test_an_answer_with_a_schema_is_of_it_or_a_call(client: openai.OpenAI) -> None:
    schema = {"$defs": {"One": {"const": 1}}, "$ref": "#/$defs/One"}
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    options = {"tools": TOOLS, "response_format": format, "temperature": 2.0, "n": 2}
    found = [ask(client, **options, seed=seed).choices for seed in range(6)]
    answers = [one for choices in found for one in choices]
    calls = [one.message.tool_calls for one in answers if one.finish_reason == "tool_calls"]
    assert {one.message.content for one in answers if one.finish_reason == "stop"} == {"1"}
    assert {call.function.name for (call,) in calls} <= {"show", "hide"}
    assert 0 < len(calls) < len(answers)


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
REFERRING: dict[str, Any] = {  # schemas of one digit under a name
    "a name that is a keyword": {"properties": {"default": {"$ref": "#/$defs/enum"}},
                                 "$defs": {"enum": DIGIT}, "required": ["default"]},
    "an address of its own": {"$id": "https://a.b/c", "properties": {"x": {"$ref": "#/$defs/d"}},
                              "$defs": {"d": DIGIT}, "required": ["x"]},
    "an anchor": {"properties": {"x": {"$ref": "#d"}}, "$defs": {"d": {"$anchor": "d", **DIGIT}},
                  "required": ["x"]},
    "what zod writes": {"$schema": "http://json-schema.org/draft-07/schema#",
                        "properties": {"x": {"$ref": "#/definitions/d"}},
                        "definitions": {"d": DIGIT}, "required": ["x"]},
}  # fmt: skip


@pytest.mark.parametrize("parameters", REFERRING.values(), ids=REFERRING)
def test_references_of_a_tools_schema_lead_where_they_did(
    client: openai.OpenAI, parameters: dict[str, Any]
) -> None:
    parameters = {**parameters, "additionalProperties": False}
    tools = [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": parameters}}]
    choice = {"type": "function", "function": {"name": "f"}}
    (one,) = ask(client, tools=tools, tool_choice=choice, temperature=2.0, seed=1).choices
    ((name, value),) = json.loads(one.message.tool_calls[0].function.arguments).items()
    assert (name, value in range(10)) == (parameters["required"][0], True)


def test_a_schema_of_any_json_holds_beside_tools(client: openai.OpenAI) -> None:
    format: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    options: Any = {"tools": TOOLS, "response_format": format, "temperature": 2.0}
    found = [ask(client, **options, seed=seed).choices[0] for seed in range(6)]
    texts = [one.message.content for one in found if one.finish_reason == "stop"]
    assert texts
    assert all(json.dumps(json.loads(text)) for text in texts)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
     "tools[0].function.parameters.type"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [*TOOLS, TOOLS[1]]}, "tools[2].function.name"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
     "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ({"messages": [USER, result(1, "x")]}, "messages[1].tool_call_id"),
    ({"messages": [*HISTORY[:3], result(3, "x")]}, "messages[3].tool_call_id"),
    ({"messages": [{**USER, "tool_calls": [called(1, "show", "{}")]}]}, "messages[0].tool_calls"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}, USER]},
     "messages[1].tool_calls[0].function"),
    ({"functions": [{"name": "f"}]}, "functions"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "name"), WRONG, ids=[name for _, name in WRONG])
def test_wrong_tools_are_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(Refused) as error:
        question(**{"messages": [USER], **fields})
    assert error.value.field == name
    assert str(error.value).startswith(f"{name}: ")


def test_a_schema_of_arguments_that_cannot_be_followed_is_the_tools_fault(
    client: openai.OpenAI,
) -> None:
    wrong = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": wrong}}]
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, tools=tools, tool_choice="required")
    assert error.value.param == "tools"
    with pytest.raises(
        openai.BadRequestError, match="its schema, or one of tools, is not supported"
    ):
        ask(client, tools=tools, response_format={"type": "json_object"})
    ask(client, tools=tools, max_tokens=1)  # where the answer is free, nothing follows it


CALL = '{"name": "show", "arguments": {"colour": "}\\"{"}}'
SAID: list[tuple[str, list[Any]]] = [  # and what it is: words, and (name, arguments)
    ("It is red.", ["It is red."]),
    (CALL, [("show", {"colour": '}"{'})]),
    (f"I look.\n{CALL}\n {CALL}\n", ["I look.", *2 * [("show", {"colour": '}"{'})]]),
    ('{\n  "name": "hide",\n  "arguments": {}\n}', [("hide", {})]),
    ('{"name": "hide", "parameters": {"a": [1, "é"]}}', [("hide", {"a": [1, "é"]})]),
    (f"{CALL} So.", [("show", {"colour": '}"{'}), " So."]),
    *((text, [text]) for text in (
        "", "\n", " {", "a {} b", f"See {CALL}", '{"name": "gone", "arguments": {}}', "{}\n{}",
        '{"name": "show", "arguments": "x"}', '{"name": "show"}', '{"name": ["show"], "a": {}}',
        '{"name": "show", "arguments": []}', '{"name": "show", "arguments": ["ab", ["c", 1]]}',
        '{"name": "show", "arguments": ""}', '{"name": "show", "arguments": null}',
        '{"name": "show", "arguments": {"a": 1e999}}', '{"name": "show", "arguments": {',
        "```json\n{'name': 'show'}\n```", '{"name": "show", "arguments": {}, "why": 1}',
        "\u00a0" + CALL + "x{",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), SAID)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_told_from_words(text: str, wanted: list[Any], size: int) -> None:
    """However the text is cut into pieces, and nothing of it is lost."""
    reader, found = CallReader(["show", "hide"]), list[Any]()
    for at in range(0, len(text), size):
        found += reader.append(text[at : at + size])
    found.append(reader.flush())
    joined = list[Any]()
    for one in found:
        if isinstance(one, Call):
            joined.append((one.name, json.loads(one.arguments)))
        elif one and joined and isinstance(joined[-1], str):
            joined[-1] += one
        elif one:
            joined.append(one)
    assert joined == [one for one in wanted if one]


@pytest.mark.parametrize("name", ["show", 'a"b\\c', "é"])
def test_a_cut_call_is_known_by_its_name(name: str) -> None:
    begun = f'{{"name": {json.dumps(name)}, "arguments": {{"a": "'
    for written in (begun, begun.replace(json.dumps(name), json.dumps(name, ensure_ascii=False))):
        reader = CallReader([name])
        assert reader.append(written) == []
        call = reader.flush(cut=True)
        assert isinstance(call, Call)
        assert (call.name, call.arguments) == (name, '{"a": "')
    for wrong in ("a\nb", "\\q", "gone"):  # not JSON, not JSON, no tool
        reader, text = CallReader([name]), f'{{"name": "{wrong}", "arguments": {{"a'
        assert [*reader.append(text), reader.flush(cut=True)] == [text]


def test_words_are_given_on_as_they_come() -> None:
    reader = CallReader(["show"])
    assert reader.append("Red ") == ["Red "]
    assert reader.append("{x}\n") == ["{x}"]
    assert reader.append("and") == ["\nand"]
    assert reader.append("\n{") == []
