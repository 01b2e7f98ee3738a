"""The state of an import on disk: an import that was killed goes on from it.

    OUT/build.json      the arguments, and the result once it is there
    OUT/shards.jsonl    a line for each finished shard, written after it
    OUT/rejected.jsonl  a line for each rejected record

A record is done when a finished shard of its group holds it or a later record.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.atomic import unlock, write_atomically
from data_pipeline.importers.media import Outcome
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError, remove_partial

# What UTF-8 cannot encode becomes an escape that JSON has, too.
_TEXT: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
_MANIFEST, SHARDS, REJECTED = "build.json", "shards.jsonl", "rejected.jsonl"


@dataclass
class Summary:
    """Counts of what was imported, by group, of what was rejected, by reason, and of notes."""

    imported: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)  # what was given and is not used

    @property
    def records(self) -> int:
        return self.imported.total() + self.rejected.total()

    def result(self) -> dict[str, Counter[str]]:
        """The counts as plain values for JSON."""
        return {"imported": self.imported, "rejected": self.rejected, "notes": self.notes}

    def add(self, result: dict[str, dict[str, int]]) -> None:
        """Adds what `result` gave of another import."""
        for name, counts in result.items():
            getattr(self, name).update(counts)


class Journal:
    """The state of the import into one folder. ShardError where that folder holds another one."""

    def __init__(self, out: Path, arguments: dict[str, Any]) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self._lock = (out / ".build.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ShardError(f"{out}: another import into it is running") from None
        # As JSON gives them back, so that they compare equal.
        self._arguments: dict[str, Any] = json.loads(json.dumps(arguments))
        self.summary = Summary()
        self.last: dict[str, int] = {}  # group -> the record that its finished shards reach
        self.shards: Counter[str] = Counter()
        self.finished = self._read_manifest()
        self._read_shards()
        self._read_rejected()
        self._finished_shards: TextIO = (out / SHARDS).open("a")
        self._rejected: TextIO = (out / REJECTED).open("a", **_TEXT)

    def handled(self, group: str, index: int) -> bool:
        return index <= self.last.get(group, -1)

    def reject(self, outcome: Outcome, reason: SampleError) -> None:
        self.summary.rejected[reason.reason] += 1
        line = {
            "key": outcome.key,
            "file": outcome.file,
            "reason": reason.reason,
            "detail": reason.detail,
            "group": outcome.group,
            "record": outcome.index,
        }
        self._rejected.write(json.dumps(line, ensure_ascii=False) + "\n")

    def shard_done(
        self, group: str, shard: Path, samples: int, last: int, notes: Counter[str]
    ) -> None:
        """Writes down a finished shard, after the rejected records before its last one."""
        line: dict[str, Any] = {
            "group": group,
            "shard": shard.name,
            "samples": samples,
            "last": last,
        }
        line |= {"notes": notes} if notes else {}
        _sync(self._rejected)
        self._finished_shards.write(json.dumps(line) + "\n")
        _sync(self._finished_shards)
        self.last[group] = last
        self.shards[group] += 1
        self.summary.imported[group] += samples
        self.summary.notes.update(notes)

    def finish(self, left_out: Counter[str]) -> None:
        """Writes the result, and sorts the rejected records by their place in the source.

        left_out: notes of records that became nothing.
        """
        self.summary.notes.update(left_out)
        self._rejected.flush()
        lines = sorted(read_lines(self.out / REJECTED), key=lambda line: line["record"])
        write_lines(self.out / REJECTED, lines)
        self._write_manifest(self.summary.result())
        self.finished = True

    def close(self) -> None:
        unlock(self._lock)
        for file in (self._rejected, self._finished_shards, self._lock):
            file.close()

    def _read_manifest(self) -> bool:
        path = self.out / _MANIFEST
        if not path.is_file():
            if any(self.out.glob("*/*.tar")):
                raise ShardError(f"{self.out} already holds shards: choose another folder")
            self._write_manifest(None)
            return False
        manifest = json.loads(path.read_text())
        if manifest["arguments"] != self._arguments:
            raise ShardError(f"{self.out} holds an import with other arguments: "
                             f"{differences(manifest['arguments'], self._arguments)}: "
                             "give the same ones, or choose another folder")  # fmt: skip
        return manifest["result"] is not None

    def _write_manifest(self, result: dict[str, Any] | None) -> None:
        text = json.dumps({"arguments": self._arguments, "result": result}, indent=2)
        write_atomically(self.out / _MANIFEST, text + "\n")

    def _read_shards(self) -> None:
        lines = read_lines(self.out / SHARDS)
        for line in lines:
            group = line["group"]
            self.last[group] = line["last"]
            self.shards[group] += 1
            self.summary.imported[group] += line["samples"]
            self.summary.notes.update(line.get("notes", {}))
        write_lines(self.out / SHARDS, lines)  # without a last line that was cut off
        if not self.finished:
            self._check_shards(lines)
        listed = {(line["group"], line["shard"]) for line in lines}
        for path in self.out.glob("*/*.tar"):
            if (path.parent.name, path.name) not in listed:
                path.unlink()  # finished, but not written down before the kill: it is made again
        for folder in self.out.iterdir():
            remove_partial(folder)

    def _check_shards(self, lines: list[dict[str, Any]]) -> None:
        """ShardError where a shard that was written down is gone: its records would be, too."""
        paths = [self.out / line["group"] / line["shard"] for line in lines]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise ShardError(
                f"{missing[0]} is gone, a shard that this import has finished: bring it back, or "
                f"remove {self.out} and import anew"
            )

    def _read_rejected(self) -> None:
        lines = read_lines(self.out / REJECTED)
        kept = [
            line for line in lines if self.finished or self.handled(line["group"], line["record"])
        ]
        write_lines(self.out / REJECTED, kept)
        self.summary.rejected.update(line["reason"] for line in kept)


def _sync(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without a last line that was cut off."""
    if not path.is_file():
        return []
    lines = path.read_text(**_TEXT).split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last is empty, or was cut off


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which arguments of an import are others now."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
