"""What a client's objects are made of: typed fields by pydantic, and errors that name the field.

A field is read, taken without effect (`harmless`), or taken with values that ask for nothing
(`neutral`). A field that is null counts as left out, whatever its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from inference.serve.limits import Limits, Refused
from inference.session.events import writable

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
_KIND = "x-effect"  # of a field, in the schema: none, or refused but for its `enum`
_WORDS = {  # of pydantic's errors
    "missing": "is needed",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "string_unicode": "has half of a character",
    "string_too_short": "expected a text with characters",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "too_short": "expected at least one",
    "dict_type": "expected an object",
    "model_type": "expected an object",
}
_SHAPES = (
    "missing",
    "list_type",
    "tuple_type",
    "too_short",
    "dict_type",
    "model_type",
    "wrong_content",
)


def harmless() -> Any:
    """A field that is taken and has no effect."""
    return Field(None, description="changes nothing", json_schema_extra={_KIND: "none"})


def neutral(why: str, *values: Any) -> Any:
    """A field that has no effect; only these values are taken, others are refused."""
    extra: dict[str, Any] = {_KIND: "refused", "enum": [*values, None]}
    return Field(None, description=why, json_schema_extra=extra)


def kind(model: type[BaseModel], name: str) -> tuple[str, list[Any]]:
    """`read`, `none` (harmless) or `refused` (neutral), and the values that are taken all the same:
    of a field of a model, by the name that clients use."""
    for field, entry in model.model_fields.items():
        extra = entry.json_schema_extra
        if (entry.alias or field) == name and isinstance(extra, dict):
            values = extra.get("enum", [None])
            assert isinstance(values, list)
            return str(extra[_KIND]), values[:-1]
    return "read", []


class Fields(BaseModel):
    """An object of a client."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    nullable: ClassVar[tuple[str, ...]] = ()  # for which null is a value

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        names = cls.names()
        for name, value in fields.items():
            short = str(writable(name[:60]))  # JSON has half characters
            if value is not None and name not in names:
                raise _error("unknown_field", _hint(short, names), short)
            effect, values = kind(cls, name)
            if value is not None and effect == "refused" and not _is_one(value, values):
                why = next(f.description for n, f in cls.model_fields.items() if n == name)
                accepted = f" (taken: {', '.join(map(repr, values))})" if values else ""
                words = f"{value!r:.60} is not supported: {why}{accepted}"
                raise _error("unsupported", words, short)
        return {n: value for n, value in fields.items() if value is not None or n in cls.nullable}

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields as clients write them."""
        return [entry.alias or name for name, entry in cls.model_fields.items()]


Model = TypeVar("Model", bound=Fields)


@dataclass(frozen=True)
class Range:
    """Annotates a finite number. largest: or which of the limits it is. 7.0 is a whole number.
    endless: a word that stands for no limit, read as None."""

    least: float
    largest: float | Callable[[Limits], float]
    whole: bool = False
    endless: str | None = None

    def read(self, value: Any, info: ValidationInfo) -> Any:
        if value is not None and value == self.endless:
            return None
        most = self.largest
        if callable(most):
            assert info.context is not None
            most = most(info.context["limits"])
        number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
        if self.whole and isinstance(number, float):
            number = int(number) if number.is_integer() else None
        if number is None or not self.least <= number <= most:  # NaN is not
            kind = "a whole number" if self.whole else "a number"
            span = f"from {_written(self.least)} to {_written(most)}"
            span += f', or "{self.endless}"' if self.endless else ""
            raise _error("invalid_value", f"{value!r:.60}: expected {kind} {span}")
        return number

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer" if self.whole else "number"}
        most = {} if callable(self.largest) else {"maximum": self.largest}
        schema |= {"minimum": self.least, **most}
        return {"anyOf": [schema, {"const": self.endless}]} if self.endless else schema


@dataclass(frozen=True, eq=False)  # a union hashes its members
class Choice:
    """Annotates one of some words. meanings: word -> what it is read as."""

    meanings: Mapping[str, Any]
    words: str = ""

    def read(self, value: Any) -> Any:
        if not isinstance(value, str) or value not in self.meanings:
            expected = self.words or " or ".join(self.meanings)
            raise _error("invalid_value", f"{value!r:.60}: expected {expected}")
        return self.meanings[value]

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": list(self.meanings)}


@dataclass(frozen=True)
class Biases:
    """Annotates finite numbers by ids of tokens, which are names in JSON: `{"50256": -100}`."""

    least: float
    largest: float

    def read(self, biases: Any) -> dict[int, float]:
        if not isinstance(biases, dict):
            raise _error("invalid_value", "expected an object of numbers by ids of tokens")
        for name, value in biases.items():
            short = str(writable(name[:60]))
            if not _TOKEN_ID.fullmatch(name):
                raise _error("invalid_value", "expected the id of a token", short)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and self.least <= value <= self.largest):  # NaN is not
                span = f"from {_written(self.least)} to {_written(self.largest)}"
                raise _error("invalid_value", f"{value!r:.60}: expected a number {span}", short)
        return {int(name): float(value) for name, value in biases.items()}

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.least, "maximum": self.largest}
        names = {"pattern": f"^({_TOKEN_ID.pattern})$"}
        return {"type": "object", "propertyNames": names, "additionalProperties": number}


@dataclass(frozen=True)
class Chars:
    """Annotates a text of at most `prompt_chars` characters."""

    def read(self, value: Any, info: ValidationInfo) -> str:
        assert info.context is not None
        most = info.context["limits"].prompt_chars
        if not isinstance(value, str):
            raise _error("invalid_value", "expected a text")
        if len(value) > most:
            raise _error("too_large", f"{len(value)} characters are more than {most}")
        return value

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string"}


def read(model: type[Model], value: Any, limits: Limits, shape: str = "invalid_value") -> Model:
    """A checked object; Refused names the field. shape: the code where something is no object or
    list, or is not there."""
    try:
        return model.model_validate(value, context={"limits": limits})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise _refused(first, shape) from None


def _refused(error: Mapping[str, Any], shape: str) -> Refused:
    code, words = error["type"], _WORDS.get(error["type"])
    inside = (error.get("ctx") or {}).get("field") or _INSIDE.get(code)
    field = _path([*error["loc"], *([inside] if inside else [])])
    if words is None:
        words = error["msg"]
        if code in _INSIDE and isinstance(parent := error["input"], dict) and inside in parent:
            words = f"{parent[inside]!r:.60}: {words}"
    elif isinstance(error["input"], str | int | float):
        words = f"{error['input']!r:.60}: {words}"
    if code in _WORDS or code not in _CODES:
        code = shape if code in _SHAPES else "invalid_value"
    return Refused(code, f"{field}: {words}" if field else words, field or None)


_INSIDE = {"wrong_part": "type", "wrong_role": "role"}  # the field that chooses a union's branch
_CODES = ("unknown_field", "unsupported", "invalid_value", "too_large", "unknown_type")


def _path(names: list[Any]) -> str:
    """The path of a field, such as `messages[0].content`; names in <> are pydantic's, of a union's
    branch."""
    path = ""
    for name in names:
        if isinstance(name, int):
            path += f"[{name}]"
        elif not name.startswith("<"):
            path += f".{name}" if path else name
    return path


def _error(code: str, words: str, field: str = "") -> PydanticCustomError:
    context = {"words": str(writable(words)), "field": field}
    return PydanticCustomError(code, "{words}", context)  # type: ignore[arg-type]


def _hint(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, 1)
    if near:
        return f"is not a field here: did you mean {near[0]}?"
    few = f"known are {', '.join(names)}" if len(names) < 16 else "docs/serving.md lists them"
    return f"is not a field here: {few}"


def _written(number: float) -> str:
    whole = isinstance(number, int) or number.is_integer()
    return str(int(number)) if whole else f"{number:g}"


def _is_one(value: Any, values: list[Any]) -> bool:
    """0 and 0.0 are one value in JSON; true is not 1."""
    both = [*values, *(float(v) for v in values if type(v) is int)]
    return any(value == one and type(value) is type(one) for one in both)
