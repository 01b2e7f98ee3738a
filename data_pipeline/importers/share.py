"""Which records are a part's, where a source is imported in parts?

The blocks of 64 records that follow each other in a file are shared out by a hash of the file's
name and the block, members of tars tar by tar. So a part is the same on any machine, whoever makes
it and however many others there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

BLOCK = 64  # records


@dataclass(frozen=True)
class Share:
    """Part `number` of `parts`; the default is the whole source."""

    number: int = 0
    parts: int = 1

    @property
    def whole(self) -> bool:
        return self.parts == 1

    def has(self, name: str) -> bool:
        """Whether what is called `name`, a record, block or tar, is in this part."""
        if self.whole:
            return True
        digest = blake2b(name.encode(errors="backslashreplace"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.parts == self.number

    def has_record(self, stem: str, number: int) -> bool:
        """Whether a record is, by its file's `stem` and its place there."""
        return self.whole or self.has(f"{stem}-{number // BLOCK}")


WHOLE = Share()
