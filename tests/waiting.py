"""Waiting for an event, in place of so many seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

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
