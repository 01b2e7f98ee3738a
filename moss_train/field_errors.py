"""Errors of Hydra and OmegaConf about a field, in one line: field, value, what it takes or how the
field is spelled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    ConfigTypeError,
    OmegaConfBaseException,
    ValidationError,
)

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def explain_field(error: OmegaConfBaseException, root: type) -> str:
    """The error in one line.

    Args:
        root: dataclass of the whole configuration.
    """
    name, line = error.full_key or "configuration", str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError | ConfigAttributeError) and is_dataclass(error.object_type):
        name = _placed(name, error.object_type, root)
        return f"{name}: is not a field: {_spelling(error, root)}"
    if isinstance(error, ConfigTypeError):
        return f"{name}: must be {_described_type(field_types(root).get(name))} ({line})"
    if isinstance(error, ValidationError) and error.key is not None:
        name = _placed(name, error.object_type, root)
        value, kind = _format_value(error.value), _described_type(_type_of(error))
        return f"{name}={value}: must be {kind}{_mend(error)}"
    return f"{name}: {line}"


@cache
def field_types(root: type, prefix: str = "") -> dict[str, Any]:
    """The type of each field by its dotted name, groups and what is inside them."""
    found: dict[str, Any] = {}
    hints = get_type_hints(root)
    for entry in fields(root):
        kind = hints[entry.name]
        found[f"{prefix}{entry.name}"] = kind
        if is_dataclass(kind):
            found |= field_types(kind, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
    return found


def similar(name: str, root: type) -> list[str]:
    """Dotted names of fields that somebody may have meant by `name`."""
    names = list(field_types(root))
    group, _, last = name.rpartition(".")
    beside = [one for one in names if one.rpartition(".")[0] == group]
    by_last = {one.rpartition(".")[2]: one for one in beside}
    near = get_close_matches(last.lower(), by_last, n=2, cutoff=0.7)
    if near:
        return [by_last[one] for one in near]
    elsewhere = [one for one in names if one.endswith(f".{name}") or one.endswith(f".{last}")]
    return elsewhere[:3] or ([] if group else get_close_matches(name, names, n=2, cutoff=0.8))


def _placed(name: str, kind: type | None, root: type) -> str:
    """The dotted name, where OmegaConf says the last part alone: of a source, and in Python."""
    if "." in name or kind is root:
        return name
    types = field_types(root).items()
    places = [one for one, hint in types if hint is kind]
    places += [f"{one}[...]" for one, hint in types if kind in get_args(hint)]
    return f"{' or '.join(places)}.{name}" if places else name


def _spelling(error: OmegaConfBaseException, root: type) -> str:
    name, kind = str(error.full_key), error.object_type
    assert kind is not None
    group, _, last = name.rpartition(".")
    inside = [entry.name for entry in fields(kind)]
    candidates = (
        similar(name, root) if group or kind is root else get_close_matches(last, inside, n=2)
    )
    if candidates:
        return f"did you mean {' or '.join(candidates)}?"
    return f"choose one of {', '.join(inside)}"


def _type_of(error: OmegaConfBaseException) -> Any:
    """Type of the field, or of the element of a list, that has a wrong value."""
    kind = error.object_type
    if kind is not None and is_dataclass(kind):
        return get_type_hints(kind).get(str(error.key))
    return next(iter(get_args(error.ref_type)), None)


def _described_type(kind: Any) -> str:
    """What a field of this type takes, in words."""
    if get_origin(kind) in (Union, UnionType):
        inner = [one for one in get_args(kind) if one is not type(None)]
        return f"{_described_type(inner[0])} or null"
    if get_origin(kind) is list:
        return "a list in brackets, [..., ...]"
    if is_dataclass(kind):
        names = ", ".join(f"{entry.name}: ..." for entry in fields(kind))
        return f"{{{names}}}"
    return WORDS.get(kind, "another kind of value")


def _format_value(value: Any) -> str:
    """A value as it is written on a command line."""
    return "null" if value is None else str(value).lower() if value in (True, False) else str(value)


def _mend(error: OmegaConfBaseException) -> str:
    value, kind = error.value, _described_type(_type_of(error))
    if "whole" in kind and isinstance(value, float) and value.is_integer():
        return f": write {int(value)}"
    if kind.startswith("a list") and isinstance(value, str):
        whole = value.startswith("[") and value.endswith("]")
        return ": no quotes may stand around it" if whole else f": write [{value}]"
    return ""


def cause_of(error: BaseException) -> OmegaConfBaseException | None:
    """OmegaConf's error behind one of Hydra's."""
    for one in _chain(error):
        if isinstance(one, OmegaConfBaseException) and one.full_key:
            return one
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
