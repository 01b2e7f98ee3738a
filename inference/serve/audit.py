"""The audit log: a line of JSON for each session and request, appended to a file that is changed
for a new one when it is large.

Lines are written by a thread of their own, so that a slow disk delays no client. What cannot be
written is counted (`moss_audit_lost_total`) and said once; it never stops the server.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
from logging.handlers import QueueListener, RotatingFileHandler
from typing import Any

log = logging.getLogger(__name__)

_WAITING = 10_000  # lines that wait for the disk at most


class AuditLog:
    """Appends lines to `path`.

    Args:
        size: bytes of a file, after which it becomes `path`.1, and so on.
        files: so many of those are kept.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: str, size: int, files: int) -> None:
        try:
            self._file = _File(path, size, files)
        except OSError as error:
            raise ValueError(f"--audit_log {path}: {error.strerror or error}") from None
        self._queue = queue.Queue[logging.LogRecord](_WAITING)
        self._listener = QueueListener(self._queue, self._file)
        self._listener.start()
        self._overrun = 0

    @property
    def written(self) -> int:
        return self._file.written

    @property
    def lost(self) -> int:
        """Lines that could not be written."""
        return self._file.lost + self._overrun

    def write(self, record: dict[str, Any]) -> None:
        """Queues a line; does not wait."""
        line = json.dumps(record, ensure_ascii=True, allow_nan=False)
        try:
            self._queue.put_nowait(logging.makeLogRecord({"msg": line}))
        except queue.Full:  # the disk does not answer
            self._overrun += 1

    def close(self) -> None:
        """Writes the lines that are queued."""
        with contextlib.suppress(queue.Full):
            self._listener.stop()
        self._file.close()


class _File(RotatingFileHandler):
    """The file and those before it."""

    def __init__(self, path: str, size: int, files: int) -> None:
        self.written = self.lost = 0
        self._failing = False
        super().__init__(path, maxBytes=size, backupCount=files, encoding="utf-8")

    def _open(self) -> Any:
        """Opens the file. A line that a full disk or a kill has cut off is ended, so that it spoils
        only itself."""
        stream: Any = super()._open()
        with contextlib.suppress(OSError), open(self.baseFilename, "rb") as written:
            written.seek(-1, 2)
            if written.read(1) != b"\n":
                stream.write("\n")
        return stream

    def emit(self, record: logging.LogRecord) -> None:
        failed = self.lost
        super().emit(record)
        if self.lost == failed:
            self.written += 1
            self._failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Replaces logging's own handler, which prints each record."""
        self.lost += 1
        if not self._failing:
            log.warning(
                "%s: lines are lost: it cannot be written", self.baseFilename, exc_info=True
            )
        self._failing = True
        stream, self.stream = self.stream, None  # type: ignore[assignment]
        if stream is not None:  # opened anew for the next line
            with contextlib.suppress(OSError, ValueError):
                stream.close()
