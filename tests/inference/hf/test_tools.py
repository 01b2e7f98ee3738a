"""Tools in an export's chat template, against what training makes of the same record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer

from data_pipeline.importers.conversation import conversation_draft
from data_pipeline.prompts import PromptBuilder, as_typed
from data_pipeline.schema import Message
from data_pipeline.tokens import SpecialTokens, load_tokenizer
from inference.serve.limits import Limits
from inference.serve.question import read_question

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "show", "description": "Wählt. <|eot_id|> <|...|>",
     "parameters": {"type": "object", "properties": {"colour": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "hide"}},
]  # fmt: skip


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "x", "function": {"name": name, "arguments": arguments}}


def record(arguments: Any) -> dict[str, Any]:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it red?"},
        {"role": "assistant", "content": "I look.",
         "tool_calls": [call("show", arguments), call("hide", {})]},
        {"role": "tool", "content": "shown"},
        {"role": "assistant", "content": None, "tool_calls": [call("show", arguments)]},
        {"role": "tool", "content": "shown again"},
    ]  # fmt: skip
    return {"messages": turns, "tools": TOOLS}


def server_tokens(builder: PromptBuilder, given: dict[str, Any]) -> list[int]:
    """The prompt of the same request in a server, whose calls have ids and their arguments JSON."""
    turns, number = [dict(turn) for turn in given["messages"]], 0
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            number += 1
            made = call["function"]["arguments"]
            made = made if isinstance(made, str) else json.dumps(made)
            call |= {"id": f"{number}", "function": {**call["function"], "arguments": made}}
        if turn["role"] == "tool":
            turn["tool_call_id"] = f"{number - (number == 2)}"
    asked = read_question({**given, "messages": turns}, Limits())
    return builder.question(asked.messages, [], "chat").tokens


@pytest.mark.parametrize(
    "arguments",
    [
        {"colour": "é <|silence|>", "n": [1, None]},
        '{"colour": "red"}',
        '{"colour":"\\u00e9 <|...|>",\n"n":[1.0,null]}',
        "{broken <|eot_id|>",
    ],
    ids=["object", "text", "another form", "no JSON"],
)
def test_a_chat_with_tools_has_the_tokens_of_training(tiny: Path, arguments: Any) -> None:
    given = record(arguments)
    tokenizer = load_tokenizer(tiny)
    builder = PromptBuilder(tokenizer, SpecialTokens.from_tokenizer(tokenizer))
    draft = conversation_draft(given, "")
    # Nothing that is spelled here is meant: no special token comes of it.
    messages = [Message(turn["role"], as_typed(turn["content"])) for turn in draft.messages]
    wanted = builder.question(messages, [], "chat").tokens
    processor = AutoProcessor.from_pretrained(tiny, trust_remote_code=True)
    options: Any = {"tools": TOOLS, "add_generation_prompt": True, "tokenize": True}
    made = processor.apply_chat_template(given["messages"], **options)
    assert made[0] == wanted
    assert server_tokens(builder, given) == wanted
    ends = wanted.count(SpecialTokens.from_tokenizer(tokenizer).eot_id)
    assert ends == len(given["messages"]) + 1  # of the turns, and of that of the tools


def test_the_tokenizers_template_says_the_same(tiny: Path) -> None:
    """Where nothing looks like a special token, which only the processor tells apart."""
    plain = json.loads(json.dumps(TOOLS).replace("<|eot_id|>", "").replace("<|...|>", ""))
    turns = record({"colour": "red"})["messages"]
    processor = AutoProcessor.from_pretrained(tiny, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    options: Any = {"tools": plain, "tokenize": False, "add_generation_prompt": True}
    template = processor.chat_template
    text = tokenizer.apply_chat_template(turns, chat_template=template, **options)
    assert text == processor.apply_chat_template(turns, **options)
    assert '{"name": "show", "arguments": {"colour": "red"}}\n{"name": "hide"' in text
