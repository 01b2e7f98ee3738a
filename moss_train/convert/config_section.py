"""A checkpoint's config.json, a mapping at a time, with errors that name file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_train.config import ConfigError


class Section:
    """A mapping of the file that knows where it stands, for the sake of its errors."""

    def __init__(self, values: Mapping[str, Any], file: str, path: str = "", name: str = ""):
        self.values, self.file, self.path, self.name = values, file, path, name

    def error(self, key: str, value: Any, allowed: str) -> ConfigError:
        """An error that names the file and the key."""
        return ConfigError([f"{self.file}: {self.path}{key} is {value!r}, it must be {allowed}"])

    def find(self, *keys: str) -> tuple[str, Any]:
        """The first of `keys` (a key and its other names) that is there, and its value."""
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        raise ConfigError([f"{self.file}: {self.path}{keys[0]} is missing"])

    def has(self, key: str) -> bool:
        """True where `key` has a value."""
        return self.values.get(key) is not None

    def integer(self, *keys: str) -> int:
        """A positive whole number (or 0)."""
        key, value = self.find(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.error(key, value, "a whole number")
        return value

    def number(self, *keys: str) -> float:
        """A number."""
        key, value = self.find(*keys)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, "a number")
        return float(value)

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers."""
        _, value = self.find(key)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(key, value, "a list of whole numbers")
        return list(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false, `default` where nothing is said."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return default if value is None else value

    def choice(self, keys: tuple[str, ...], allowed: tuple[str, ...]) -> str:
        """One of `allowed`, under one of `keys`; the first of `allowed` where nothing is said."""
        key = next((key for key in keys if key in self.values), keys[0])
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.error(key, value, f"one of {', '.join(allowed)}")
        return allowed[0] if value is None else value

    def section(self, *keys: str) -> Section:
        """A mapping inside this one."""
        key, value = self.find(*keys)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "a mapping")
        return Section(value, self.file, f"{self.path}{key}.")

    def with_defaults(self, defaults: Mapping[str, Any]) -> Section:
        """This mapping, with `defaults` for keys that are not there at all."""
        return Section({**defaults, **self.values}, self.file, self.path, self.name)

    def expect(self, key: str, expected: Any) -> None:
        """Refuses another value than the one that the model is written for."""
        value = self.values.get(key)
        if value is not None and value != expected:
            raise self.error(key, value, repr(expected))


def read_section(source: str | Path | Mapping[str, Any]) -> Section:
    """A config.json: its file, the folder that holds it, or what was read from it.

    Raises:
        ConfigError: it is not there, or not a JSON object.
    """
    if isinstance(source, Mapping):
        return Section(source, "config", name="imported")
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}: is not JSON: {error}"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: holds no mapping"])
    return Section(values, str(path), name=path.absolute().parent.name)
