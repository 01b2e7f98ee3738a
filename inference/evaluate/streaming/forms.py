"""Reads files of benchmarks, and checks the fields of their entries before anything is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.commands import one_line
from data_pipeline.seconds import parse_seconds

_MOST = 1e15  # numbers must be smaller


class FormError(ValueError):
    """A file does not have the expected form; the text names file, entry and field."""


def kind_of(file: Path, kinds: Mapping[str, str]) -> str:
    """The kind of a file, by its name. Raises FormError for a name that is not in `kinds`."""
    if file.stem not in kinds:
        names = ", ".join(f"{name}.json" for name in kinds)
        raise FormError(f"{file}: its name says what it holds: name it as one of {names}")
    return kinds[file.stem]


class Entry:
    """An object of a file. Every getter raises FormError, which names the field."""

    def __init__(self, place: str, data: Any, needs: Sequence[str] = ()) -> None:
        """`place`: file and number of the entry, for errors. `needs`: fields that it must have."""
        if not isinstance(data, dict):
            raise FormError(f"{place}: expected an object with {', '.join(needs) or 'fields'}")
        missing = [name for name in needs if name not in data]
        if missing:
            there = ", ".join(sorted(map(str, data))[:12])
            raise FormError(f"{place}: missing {', '.join(missing)} (it has {there})")
        self.place, self.data = place, data

    def __contains__(self, name: str) -> bool:
        return self.data.get(name) is not None

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str):
            raise self._wrong(name, "a text", value)
        return value

    def number(self, name: str) -> float:
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MOST:
            raise self._wrong(name, "a number", value)
        return float(value)

    def seconds(self, name: str) -> float:
        """A time in seconds, or as HH:MM:SS."""
        try:
            return parse_seconds(self.data.get(name))
        except ValueError:
            raise self._wrong(name, "a time", self.data.get(name)) from None

    def span(self, name: str) -> tuple[float, float]:
        """Two seconds: `[3, 7.5]` or `"3 -- 7.5"`."""
        value = self.data.get(name)
        parts = value.split("--") if isinstance(value, str) else value
        try:
            start, end = (float(part) for part in parts)  # type: ignore[union-attr]
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(name, "two seconds", value) from None
        if not (abs(start) < _MOST and abs(end) < _MOST):  # nor is it NaN
            raise self._wrong(name, "two seconds", value)
        return start, end

    def elements(self, name: str) -> list[Any]:
        value = self.data.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list", value)
        return value

    def texts(self, name: str) -> list[str]:
        return [str(value) for value in self.elements(name)]

    def entries(self, name: str, needs: Sequence[str], least: int = 0) -> list[Entry]:
        """The objects of a list, at least `least`, each with the fields that it needs."""
        found = [
            Entry(f"{self.place}, {name}[{i}]", data, needs)
            for i, data in enumerate(self.elements(name))
        ]
        if len(found) < least:
            raise FormError(f"{self.place}: {name}: is empty")
        return found

    def _wrong(self, name: str, what: str, value: Any) -> FormError:
        found = "it is missing" if value is None else f"it is {value!r:.60}"
        return FormError(f"{self.place}: {name}: must be {what}, {found}")


def read_list(path: Path) -> list[Any]:
    """The list in a JSON file, or the lines of a JSON Lines file. Raises FormError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FormError(f"{path}: cannot be read: {one_line(error)}") from None
    if path.suffix == ".jsonl":  # a text in it may have other ends of lines than this one
        lines = enumerate(text.split("\n"), 1)
        return [_json(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    data = _json(str(path), text)
    if not isinstance(data, list):
        raise FormError(f"{path}: expected a list of entries")
    return data


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormError(f"{place}: is not JSON: {error}") from None


def read_entries(path: Path, needs: Sequence[str]) -> list[Entry]:
    """The entries of a file, each with the fields that it needs. Raises FormError."""
    return [Entry(f"{path}, entry {i}", data, needs) for i, data in enumerate(read_list(path))]
