"""Keeps what was paid for: every reply by its request's hash, and the outcome of each video.

A SQLite file in write-ahead mode: a process that is killed loses no reply that it had committed.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

from data_pipeline.atomic import unlock
from data_pipeline.shards import ShardError

REPLIES = "replies.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, kind TEXT, reply TEXT, tokens_in INTEGER, tokens_out INTEGER);
CREATE TABLE IF NOT EXISTS wasted (kind TEXT, tokens_in INTEGER, tokens_out INTEGER);
CREATE TABLE IF NOT EXISTS videos (path TEXT, fingerprint TEXT, outcome TEXT,
    PRIMARY KEY (path, fingerprint));
"""


class Store:
    """Replies and outcomes of one output folder; one process at a time works on it."""

    def __init__(self, out: Path) -> None:
        """Raises ShardError for a folder that another process works on, or a damaged file."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / REPLIES
        self._lock = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ShardError(f"{out}: another process is working on it") from None
        try:
            self._base = sqlite3.connect(path, isolation_level=None)
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise ShardError(f"{path}: cannot be used ({error}): remove it to start anew") from None

    def reply(self, key: str) -> Any | None:
        """The stored reply to a request; None: there is none."""
        row = self._base.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, key: str, kind: str, reply: Any, tokens: tuple[int, int]) -> None:
        """Stores a reply; `tokens`: of the prompt and of the reply, as the server counts them."""
        text = json.dumps(reply, ensure_ascii=False)
        self._base.execute(
            "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)", (key, kind, text, *tokens)
        )

    def waste(self, kind: str, tokens: tuple[int, int]) -> None:
        """Counts a reply that was paid for and cannot be used."""
        self._base.execute("INSERT INTO wasted VALUES (?, ?, ?)", (kind, *tokens))

    def usage(self) -> dict[str, tuple[int, int, int]]:
        """(replies, tokens in, tokens out) by kind of request; wasted ones as `unusable KIND`."""
        rows = self._base.execute(
            "SELECT kind, COUNT(*), SUM(tokens_in), SUM(tokens_out) FROM replies GROUP BY kind"
            " UNION ALL SELECT 'unusable ' || kind, COUNT(*), SUM(tokens_in), SUM(tokens_out)"
            " FROM wasted GROUP BY kind ORDER BY 1"
        )
        return {kind: (count, read, written) for kind, count, read, written in rows}

    def outcome(self, path: str, fingerprint: str) -> dict[str, Any] | None:
        """The outcome of a video with the settings of a fingerprint; None: it is not finished."""
        row = self._base.execute(
            "SELECT outcome FROM videos WHERE path = ? AND fingerprint = ?",
            (_storable(path), fingerprint),
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def finished(self, path: str, fingerprint: str) -> bool:
        """Whether `outcome` has one."""
        row = self._base.execute(
            "SELECT 1 FROM videos WHERE path = ? AND fingerprint = ?",
            (_storable(path), fingerprint),
        )
        return row.fetchone() is not None

    def finish(self, path: str, fingerprint: str, outcome: dict[str, Any]) -> None:
        text = _storable(json.dumps(outcome, ensure_ascii=False))
        self._base.execute(
            "INSERT OR REPLACE INTO videos VALUES (?, ?, ?)", (_storable(path), fingerprint, text)
        )

    def close(self) -> None:
        self._base.close()
        unlock(self._lock)
        os.close(self._lock)


def _storable(text: str) -> str:
    """A text as UTF-8 has it: bytes of a file's name that are not UTF-8 become escapes, as JSON has
    them, too."""
    return text.encode("utf-8", "backslashreplace").decode()
