"""Files of JSON lines in a run folder: metrics.jsonl, history.jsonl, bad_steps.jsonl, the audit.

On a full disk, or a server that does not answer, a warning says so, and training goes on: lines
wait, in memory, until they can be written.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moss_train.log import log, print_line

MOST = 100_000  # lines of a file that wait, at most
_waiting: dict[Path, deque[bytes]] = {}
_reported: set[Path] = set()  # files that could not be written


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a file; and to all files the lines that could not be written before. Numbers
    that are not finite, which JSON does not have, are null."""
    waiting = _waiting.setdefault(path, deque(maxlen=MOST))
    if len(waiting) == MOST - 1:
        print_line(f"{path}: {MOST} lines wait: of more the oldest are lost")
    waiting.append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
    for late in list(_waiting):
        _try(late)


def _finite(value: Any) -> Any:
    """`value`, or a dictionary's values at any depth, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _try(path: Path) -> None:
    """Writes the lines that wait for a file, if it can be written."""
    lines = _waiting[path]
    try:
        _write(path, b"".join(lines))
    except OSError as error:
        if path not in _reported:
            print_line(f"{path} cannot be written ({error}): its lines wait; training goes on")
            _reported.add(path)
        return
    del _waiting[path]
    if path in _reported:
        print_line(f"{path} can be written again: {len(lines)} line(s) have waited")
        _reported.discard(path)


def _write(path: Path, data: bytes) -> None:
    """Appends all of `data`, or nothing."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # a killed job's line, cut off
        try:
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def read(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The lines of a file that are whole, and have what is `needed`; [] where there is none. Of
    others (a killed job's) a warning says how many there are.
    """
    return [record for _, record in _whole(path, needed)]


def cut(path: Path, last: int) -> None:
    """Removes the lines of steps after `last`, with which a file of steps ends. That needs no
    space on the disk."""
    end, size = 0, path.stat().st_size if path.exists() else 0
    for place, record in _whole(path, ("step",)):
        if record["step"] <= last:
            end = place
    if end < size:
        os.truncate(path, end)
    kept = [line for line in _waiting.pop(path, ()) if json.loads(line)["step"] <= last]
    if kept:
        _waiting[path] = deque(kept, maxlen=MOST)


def _whole(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line of a file: where it ends, and its record."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    place = left_out = 0
    for line in lines:
        place += len(line)
        record = _parse(line)
        if record is not None and record.keys() >= set(needed):
            yield place, record
        else:
            left_out += 1
    if left_out:
        log.warning("%s: %d line(s) not whole, left out", path, left_out)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step", 0), int)
    return record if whole else None
