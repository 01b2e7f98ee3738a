"""Waiting for an event, in place of so many seconds."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Seconds for what must come. It ends a hang: of how fast something is it says nothing, since any
# process and thread may stand still for seconds on a busy machine.
PATIENCE = 300.0


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Waits for something that must come true. It may have been true before, and not any more when
    this returns: what is asserted afterwards must hold from that event on."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def received(one: socket.socket, enough: Callable[[bytes], object]) -> bytes:
    """What comes over a connection, which has a timeout, until it is enough: its end is not."""
    came = b""
    while not enough(came):
        piece = one.recv(2**16)
        assert piece, f"the connection has ended after {came[-500:]!r}"
        came += piece
    return came


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is killed at the end of the block, also where the test fails in it: `Popen`
    alone would then wait for one that does not end by itself."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()
