"""The bytes of a tar's members, also of sparse ones (`tar -S`), whose holes are not in the tar."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import cast

Extents = Sequence[tuple[int, int]] | None  # offset and length of what is stored; None: all


def stored_size(size: int, extents: Extents) -> int:
    """How many bytes of a member of `size` bytes lie in the tar, from its `offset_data` on."""
    return size if extents is None else sum(length for _, length in extents)


def extents_of(member: tarfile.TarInfo) -> Extents:
    """What is stored of a member, as tarfile has read its headers."""
    return cast(Extents, member.sparse)  # typeshed says that it is bytes


def with_holes(stored: bytes, size: int, extents: Extents) -> bytes:
    """A member's bytes, from those that are stored of it. ValueError where some are missing."""
    if len(stored) != stored_size(size, extents):
        raise ValueError("is cut off")
    if extents is None:
        return stored
    whole, at = bytearray(size), 0
    for start, length in extents:
        whole[start : start + length] = stored[at : at + length]
        at += length
    return bytes(whole)
