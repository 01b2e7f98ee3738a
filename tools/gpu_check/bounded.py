"""Runs a command for a limited time, after which nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from data_pipeline.signal_handlers import handling


def run_bounded(command: list[str], log: Path, limit: float) -> int | None:
    """Runs a command that prints to `log`; its exit code, or None where it was killed after `limit`
    seconds.

    However it ends, also where this process is asked to, the processes that it has started are
    killed and its temporary files removed: a save that takes too long has written tens of
    gigabytes, and its writers would go on.
    """
    with (
        handling((signal.SIGTERM, signal.SIGHUP), lambda number, _: sys.exit(128 + number)),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        log.open("w") as out,
    ):
        # What torch compiles stays: it would else be below TMPDIR.
        compiled = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
        environment = {"TORCHINDUCTOR_CACHE_DIR": compiled, **os.environ, "TMPDIR": temporary}
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # it has ended, and started none, or these have
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
