"""Tools of a chat request: which ones the prompt shows, and what of an answer calls them.

A model calls tools if its training had samples that do; how those look is data_pipeline's
(`tool_texts.py`). Where a call is asked for, a grammar sees to it, whatever the model has learned.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.tool_texts import as_json, call_line
from inference.serve.limits import Refused
from inference.serve.requests import Answer, ChatRequest, NamedTool, Tool, ToolResult
from inference.serve.typed_fields import kind as effect_of

_BEGUN = re.compile(r'\s*\{\s*"name":\s*("(?:[^"\\]|\\.)*"),\s*"arguments":\s*(\{.*)', re.DOTALL)
_VALUES = ("const", "enum", "default", "examples")  # of a schema: values, not schemas
# Of a schema: objects whose keys are names, and their values schemas.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


@dataclass(frozen=True)
class Call:
    """A call of a tool. arguments: JSON of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_dict(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Tools:
    """What an answer may call.

    definitions: the tools as the request has them, without a client's marks. schemas: of the
    arguments, by name, of those that may be called. needed: the answer is a call. several: it may
    have more than one.
    """

    definitions: Sequence[Any]
    schemas: Mapping[str, Mapping[str, Any]]
    needed: bool
    several: bool

    def text(self) -> str:
        """Their descriptions, for the prompt."""
        return as_json(self.definitions)

    def schema(self, other: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A JSON Schema of the answer; None: it is free. other: of answers that call nothing."""
        if not self.needed and other is None:
            return None
        forms = [] if self.needed or other is None else [_moved(other, "#/anyOf/0")]
        for name, parameters in self.schemas.items():
            place = f"#/anyOf/{len(forms)}/properties/arguments"
            own = _moved({**parameters, "type": "object"}, place)
            properties = {"name": {"const": name}, "arguments": own}
            required = ["name", "arguments"]
            forms.append({
                "type": "object", "properties": properties, "required": required,
                "additionalProperties": False,
            })  # fmt: skip
        return {"anyOf": forms}


def read_tools(request: ChatRequest, definitions: Any) -> Tools | None:
    """The tools of a request that an answer may call; None: there are none. definitions: its
    field as it came. Raises Refused."""
    choice, schemas = request.tool_choice, dict[str, Mapping[str, Any]]()
    for number, tool in enumerate(request.tools):
        name, parameters = tool.function.name, tool.function.parameters
        if name in schemas:
            where = f"tools[{number}].function.name"
            raise Refused("invalid_value", f"{where}: {name!r:.60} is given twice", where)
        kind = parameters.get("type") or "object"
        if "object" not in (kind if isinstance(kind, list) else [kind]):
            where = f"tools[{number}].function.parameters.type"
            raise Refused("invalid_value", f"{where}: {kind!r:.60}: expected object", where)
        schemas[name] = parameters
    if choice != "none" and choice != "auto" and not schemas:
        raise Refused("invalid_value", "tool_choice: there are no tools", "tool_choice")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in schemas:
            words = f"tool_choice.function.name: {name!r:.60} is none of the tools"
            raise Refused("invalid_value", words, "tool_choice.function.name")
        schemas = {name: schemas[name]}
    if not schemas or choice == "none":
        return None
    read = [{n: one[n] for n in one if effect_of(Tool, n)[0] == "read"} for one in definitions]
    return Tools(read, schemas, choice != "auto", request.parallel_tool_calls)


def call_lines(turn: Answer) -> list[str]:
    """An assistant's calls as its turn has them."""
    return [call_line(call.function.name, call.function.arguments) for call in turn.tool_calls]


def in_order(turns: Sequence[Any]) -> list[tuple[int, Any]]:
    """The messages and their numbers in the request, with the results of each answer's calls in the
    order of the calls, which is all that tells the model whose they are. Raises Refused for a
    result of no call."""
    places = list[tuple[int, int]]()  # of each: number of the answer before, and of its call
    answer, calls = 0, dict[str, int]()
    for number, turn in enumerate(turns):
        if not isinstance(turn, ToolResult):
            answer, called = number, turn.tool_calls if isinstance(turn, Answer) else ()
            calls = {call.id: place for place, call in enumerate(called, 1)}
            places.append((answer, 0))
        elif turn.tool_call_id in calls:
            places.append((answer, calls[turn.tool_call_id]))
        else:
            where = f"messages[{number}].tool_call_id"
            words = f"{where}: {turn.tool_call_id!r:.60} is no call of the answer before"
            raise Refused("invalid_value", words, where)
    return sorted(enumerate(turns), key=lambda one: places[one[0]])


class CallReader:
    """Tells calls from words in an answer's text, as it comes. Holds back what may become a call:
    a line that begins with `{`, up to the bracket that closes it.

    Args:
        names: of the tools. An object that names none of them is text.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._called = set(names), False
        self._held, self._line_begins = "", True
        self._depth, self._in_string, self._escaped = 0, False, False

    def append(self, piece: str) -> list[str | Call]:
        """Takes a piece; returns what is known now."""
        found: list[str | Call] = []
        for character in piece:
            self._held += character
            if self._depth:
                self._count(character)
                if not self._depth:
                    found.append(self._call())
            elif character == "{" and self._line_begins:
                self._depth = 1
            elif character == "\n" or (self._line_begins and character.isspace()):
                self._line_begins = True
            else:
                self._line_begins = False
                found.append(self._give())
        return _joined(found)

    def flush(self, cut: bool = False) -> str | Call:
        """What was held back, at the end of the answer, without white space behind a call. cut: the
        end is that of its length: a call whose arguments have begun is one, with a part of them."""
        held = self._give()
        begun = _BEGUN.fullmatch(held) if cut else None
        if begun is not None:
            for name in self._names:
                if begun[1] in (as_json(name), json.dumps(name)):
                    return Call(name, begun[2])
        return "" if self._called and held.isspace() else held

    def _give(self) -> str:
        held, self._held = self._held, ""
        return held

    def _count(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped, self._in_string = character == "\\", character != '"'
        elif character == '"':
            self._in_string = True
        else:
            self._depth += {"{": 1, "}": -1}.get(character, 0)

    def _call(self) -> str | Call:
        """What is held, as a call if it is one. A model of Llama 3's own form says `parameters`."""
        self._line_begins = False
        try:
            fields = json.loads(self._held)
            name = fields.pop("name")
            ((kind, arguments),) = fields.items()
            named = name in self._names and kind in ("arguments", "parameters")
            if named and isinstance(arguments, dict):
                call = Call(name, as_json(arguments, allow_nan=False))
                self._held, self._called = "", True
                return call
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return self._give()


def _joined(pieces: Sequence[str | Call]) -> list[str | Call]:
    """With texts that follow each other as one, and without empty ones."""
    joined: list[str | Call] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece:
            joined.append(piece)
    return joined


def _moved(schema: Any, place: str, by_name: bool = False) -> Any:
    """A schema that has become a part of another one: `$ref`s from its root lead to the same.
    by_name: it is an object of schemas, whose keys are any names."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict) or (_is_document(schema) and not by_name):
        return schema
    moved = {
        key: value
        if key in _VALUES and not by_name
        else _moved(value, place, key in _BY_NAME and not by_name)
        for key, value in schema.items()
    }
    led = None if by_name else moved.get("$ref")
    if isinstance(led, str) and (led == "#" or led.startswith("#/")):
        moved["$ref"] = place + led[1:]
    return moved


def _is_document(schema: dict[str, Any]) -> bool:
    """Whether a schema has an address of its own, from which its `$ref`s lead wherever it is."""
    return isinstance(schema.get("$id"), str) and not schema["$id"].startswith("#")
