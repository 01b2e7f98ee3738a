"""JSON as Python reads it, but for a key that stands twice in an object with different values: of
these Python takes the last without a word."""

from __future__ import annotations

import json
from typing import Any


class Decoder:
    """Reads JSON values; one in which a key stands twice is a ValueError."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def loads(self, data: str | bytes) -> Any:
        """The value of a text. Raises ValueError (RecursionError for one that is too deep)."""
        if isinstance(data, bytes):
            data = data.decode(json.detect_encoding(data), "surrogatepass")
        elif data.startswith("\ufeff"):
            raise ValueError("Unexpected UTF-8 BOM (decode using utf-8-sig)")
        self._repeated.clear()
        value = self._decoder.decode(data)
        if repeated := self.repeated():
            raise ValueError(repeated)
        return value

    def raw_decode(self, text: str, at: int) -> tuple[Any, int]:
        """The value that begins at a place of a text, and where it ends. Raises as `loads`, but not
        for a repeated key: `repeated` says that."""
        self._repeated.clear()
        return self._decoder.raw_decode(text, at)

    def repeated(self) -> str | None:
        """What was wrong of the keys of the value that was read last."""
        if not self._repeated:
            return None
        return f"the key {self._repeated[0]!r} stands twice in an object: keep one"

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):  # NaN, which is one object here, is not equal to itself
            self._repeated += [k for k, v in pairs if made[k] is not v and made[k] != v]
        return made


def loads(data: str | bytes) -> Any:
    """As json.loads; ValueError for a key that stands twice with different values."""
    return Decoder().loads(data)  # not a shared one: threads read, too
