"""How conversations show tools to the model, in samples and in requests alike: as text.

Descriptions are JSON in a system turn, the first one. A call is a line of the assistant's turn, a
JSON object with `name` and `arguments`, as in LLaMA-Factory's data. A result is a user's turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def call_line(name: str, arguments: Any) -> str:
    """A call. arguments: an object, or its JSON; what is not JSON stays as it is, a text."""
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    return as_json({"name": name, "arguments": arguments})


def with_calls(content: str, calls: Sequence[str]) -> str:
    """An assistant's turn: what it says, then its calls."""
    return "\n".join(filter(None, [content, *calls]))


def as_json(value: Any) -> str:
    """The form of all JSON in conversations."""
    return json.dumps(value, ensure_ascii=False)
