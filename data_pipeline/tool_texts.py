"""How conversations show tools to the model, in samples and in requests alike: as text.

Descriptions are JSON in a system turn, the first one. A call is a line of the assistant's turn, a
JSON object with `name` and `arguments`, as in LLaMA-Factory's data. A result is a user's turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

_HALVES = re.compile("[\ud800-\udfff]")


def call_line(name: str, arguments: Any) -> str:
    """A call. arguments: an object, or its JSON; what is not JSON, or too deep for a parser, stays
    as it is, a text."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            return as_json({"name": name, "arguments": json.loads(arguments)})
    return as_json({"name": name, "arguments": arguments})


def with_calls(content: str, calls: Sequence[str]) -> str:
    """An assistant's turn: what it says, then its calls."""
    return "\n".join(filter(None, [content, *calls]))


def as_json(value: Any, *, allow_nan: bool = True) -> str:
    """The form of all JSON in conversations. Half characters, which JSON may have and no text can,
    stay escaped, as in `\\ud800`. allow_nan: as json.dumps's."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _HALVES.sub(lambda half: f"\\u{ord(half[0]):04x}", text)
