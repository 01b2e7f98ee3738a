"""The file of API keys (`--keys`): who may ask, and how much.

keys:
  - {name: shop-floor, key: sk-..., sessions: 4, frames_per_second: 8, tokens_per_minute: 60000}
  - {name: me, key: sk-..., operator: true}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Quota(BaseModel):
    """Limits of a key; None: none. Over all its sessions and requests."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    sessions: Annotated[int, Field(gt=0)] | None = None  # and chat requests, at once
    frames_per_second: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    tokens_per_minute: Annotated[int, Field(gt=0)] | None = None  # given and said


class Key(Quota):
    """name: as logs and metrics call it. operator: whether it may read /metrics, and /admin."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    key: Annotated[str, Field(pattern=r"^[!-~]{8,512}$")]
    operator: bool = False


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    keys: Annotated[list[Key], Field(min_length=1)]


_WORDS = {  # of pydantic's errors, whose own would be riddles here
    "string_pattern_mismatch": {
        "name": "up to 64 letters, digits, `.`, `_` and `-`",
        "key": "8 to 512 signs of ASCII without spaces",
    },
}


def read_keys(path: str) -> list[Key]:
    """The keys of a file in YAML or JSON; ValueError that names the file and the field, and never
    tells a key."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        document: Any = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"--keys {path}: {error.strerror or error}") from None
    except yaml.MarkedYAMLError as error:  # its text has lines of the file
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise ValueError(f"--keys {path}: is not YAML: {error.problem}{line}") from None
    except (ValueError, yaml.YAMLError) as error:
        kind = "JSON" if path.endswith(".json") else "YAML"
        raise ValueError(f"--keys {path}: is not {kind}: {type(error).__name__}") from None
    try:
        keys = _File.model_validate(document).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        field = str(first["loc"][-1]) if first["loc"] else ""
        words = _WORDS.get(first["type"], {}).get(field, first["msg"])
        raise ValueError(f"--keys {path}: {where.removeprefix('.')}: {words}") from None
    for field in ("name", "key"):
        first_numbers: dict[str, int] = {}
        for number, one in enumerate(keys):
            first_one = first_numbers.setdefault(getattr(one, field), number)
            if first_one != number:
                words = f"keys[{number}].{field}: is that of keys[{first_one}], too"
                raise ValueError(f"--keys {path}: {words}")
    return keys
