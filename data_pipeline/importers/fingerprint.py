"""Tells a source from the same one after an edit: by names, sizes and contents of its files.

An import that goes on compares them, and so does each part of one on many machines. So of very many
or large files a part of the contents is read. Times of change are not compared: copies have others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b

from data_pipeline import files

_FILES = 20_000  # of a source, whose contents are looked at
_WHOLE = 1 << 30  # bytes of a source that are read: of the files behind them pieces are
_PIECES, _PIECE = 64, 1 << 14  # of such a file, at most; bytes
_ALL_PIECES = 1 << 13  # of a source, but two of each file: on network disks each takes milliseconds


def fingerprint(paths: Sequence[str], looked_at: Sequence[str]) -> str:
    """16 hexadecimal digits.

    Args:
        paths: the files of a source, in order; their names count.
        looked_at: those of them whose sizes and contents count, too.
    """
    digest = blake2b(digest_size=8)
    for path in paths:
        digest.update(f"{files.name(path)}\n".encode(errors="backslashreplace"))
    step = -(-len(looked_at) // _FILES) or 1
    chosen, left = looked_at[::step], _WHOLE
    pieces = min(_PIECES, max(2, _ALL_PIECES // max(1, len(chosen))))
    for path in chosen:
        if files.in_store(path):
            digest.update(files.version(path).encode())
        elif files.is_url(path):
            digest.update(f"{files.file_size(path)}\n".encode())
        elif os.path.exists(path):  # no link to nothing
            size = files.file_size(path)
            whole = size <= max(left, pieces * _PIECE)
            digest.update(f"{size}\n".encode())
            with suppress(OSError):  # told when it is read
                digest.update(_contents(path, size, 0 if whole else pieces))
            left -= min(size, left) if whole else 0
    return digest.hexdigest()


def _contents(path: str, size: int, pieces: int) -> bytes:
    """A digest of pieces of a file, evenly spread, the first and the last among them; 0: of all."""
    found = blake2b(digest_size=16)
    with open(path, "rb") as file:
        if not pieces:
            while data := file.read(1 << 20):
                found.update(data)
        else:
            for piece in range(pieces):
                file.seek((size - _PIECE) * piece // (pieces - 1))
                found.update(file.read(_PIECE))
    return found.digest()
