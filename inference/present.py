"""Shows a session's events until the last one, also where a signal ends the command before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.commands import DONE, FAILED, PIPE_CLOSED, STOPPED
from data_pipeline.signal_handlers import handling
from inference import cli
from inference.session.events import Event
from inference.session.handle import SessionHandle

_AGAIN = 1.0  # seconds after which another Ctrl-C is a second one
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; a batch system; a closed window


class Sink:
    """Where `--jsonl` goes: a file, `-` for stdout, or nowhere."""

    def __init__(self, name: str | None) -> None:
        self.terminal, self._name = name == "-", name
        self._out: TextIO | None = None
        if name:
            file = Path(name)
            self._out = sys.stdout if self.terminal else file.open("w", encoding="utf-8")

    @staticmethod
    def check(name: str | None) -> None:
        """Raises CommandError for a file that cannot be written, before a model is loaded."""
        if not name or name == "-":
            return
        path = Path(name)
        if path.is_dir() or not path.parent.is_dir():
            problem = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise cli.CommandError(f"--jsonl {name}: {problem}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise cli.CommandError(f"--jsonl {name}: it may not be written")

    def show(self, event: Event) -> None:
        """Writes an event as a line of JSON. OSError that names the file."""
        if not self._out:
            return
        try:
            # A terminal of another encoding does not have all signs: JSON's own escapes are ASCII.
            bare = not (self._out.encoding or "").lower().startswith("utf")
            print(json.dumps(event.as_dict(), ensure_ascii=bare), file=self._out, flush=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._name) from None

    def close(self) -> None:
        if self._out and not self.terminal:
            with contextlib.suppress(OSError):  # what is not written yet is not writable
                self._out.close()


class Stop:
    """Who has ended the command before its session was over."""

    def __init__(self, session: SessionHandle) -> None:
        self._session = session
        self.signal, self._since = 0, 0.0  # the first one that came, and when
        self.unread = False  # nobody reads the terminal or pipe any more

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Closes the session at the first signal. A second Ctrl-C ends the command at once."""
        # Those that are ignored stay so, as `nohup` and `&` have it.
        signals = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        with handling(signals, self._take):
            yield

    def _take(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self.signal:
            # The same request may come twice at once, from a terminal and from torchrun.
            if number == signal.SIGINT and now - self._since > _AGAIN:
                os._exit(STOPPED)
            return
        self.signal, self._since = number, now
        # In a thread, for this one may hold the lock of the session's log.
        threading.Thread(target=self._session.close, args=("interrupted",), daemon=True).start()

    def show(self, show: Callable[[Event], Any], event: Event) -> None:
        """Shows an event on the terminal; where nobody reads it any more, closes the session."""
        if self.unread:
            return
        try:
            show(event)
        except OSError:  # a closed pipe (`| head`), or a closed window
            self.unread = True
            self._session.close("nobody reads the output")
            # Else Python complains when it writes what is left at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def present(
    session: SessionHandle,
    events: Iterable[Event],
    jsonl: str | None,
    show: Callable[[Event], Any],
    conclude: Callable[[dict[str, Event]], Any],
) -> int:
    """Shows events until the session is over, on the terminal and in `--jsonl`; the exit code.

    show: takes each event, unless `--jsonl` is the terminal.
    conclude: takes the last event of each type, at the end.
    """
    sink, stop = Sink(jsonl), Stop(session)
    newest: dict[str, Event] = {}
    with stop.listening(), contextlib.closing(sink):
        for event in events:
            if sink.terminal:
                stop.show(sink.show, event)
            else:
                sink.show(event)
                stop.show(show, event)
            newest[event.type] = event
    if stop.signal:
        cli.note("interrupted")
    conclude(newest)
    if stop.signal:
        return STOPPED
    if stop.unread:
        return PIPE_CLOSED
    return FAILED if "error" in newest else DONE
