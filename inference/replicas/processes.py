"""The replicas that the front starts itself: one process for each GPU or group of GPUs, started
again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from inference.replicas.replica import Replica

log = logging.getLogger(__name__)

_PATIENCE = 15.0  # seconds in which a process must end after SIGTERM
_AGAIN = (
    0.0,
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    30.0,
)  # seconds; after failures in a row


class Process:
    """A replica's process, from the start of the front to its end.

    Args:
        command: its arguments.
        environment: what it has beside the front's.
    """

    def __init__(
        self, replica: Replica, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.replica, self._command = replica, list(command)
        self._environment = {**os.environ, **environment}
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.starts = 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def run(
        self, exited: Callable[[Process, int], None], settled: Callable[[], Awaitable[object]]
    ) -> None:
        """Keeps the process running until `stop`; calls `exited` with its exit code, and waits for
        `settled` before it starts again."""
        failures = 0
        while not self._stopping:
            code = await self._once()
            exited(self, code)
            if self._stopping:
                return
            failures = 0 if self.replica.served else failures + 1
            seconds = _AGAIN[min(failures, len(_AGAIN) - 1)]
            words = f"replica {self.replica.number} ended ({code}): started again"
            log.warning("%s in %g s", words, seconds)
            await asyncio.sleep(seconds)
            await settled()

    async def _once(self) -> int:
        path = self.replica.address.removeprefix("unix:")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self.replica.state, self.replica.served = "starting", False
        self.starts += 1
        child = [sys.executable, "-m", "inference.replicas.child", str(os.getpid())]
        self._process = await asyncio.create_subprocess_exec(
            *child, *self._command, env=self._environment, start_new_session=True
        )
        self.replica.pid = self._process.pid
        try:
            return await self._process.wait()
        finally:
            self.replica.pid = None

    def restart(self) -> None:
        """Ends the process; `run` starts it again at once."""
        self.end(signal.SIGTERM)

    def end(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def stop(self) -> None:
        """Ends the process for good."""
        self._stopping = True
        self.end(signal.SIGTERM)
        if self._process is not None:
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self._process.wait()
            except TimeoutError:
                self.end(signal.SIGKILL)
                await self._process.wait()


def command(argv: Sequence[str], socket: Path, gpus: int, number: int) -> list[str]:
    """The command that starts a replica: the front's own flags, without those that make it a
    front."""
    start = [sys.executable, "-m"]
    if gpus > 1:
        start += ["inference.replicas.ranks", str(number), str(gpus), str(socket.parent)]
    else:
        start += ["inference.serve"]
    own = ["--replicas", "0", "--replica_urls", "", "--unix_socket", str(socket)]
    own += ["--ssl_certfile", "", "--ssl_keyfile", "", "--keys", "", "--audit_log", ""]
    own += ["--gpus_per_replica", "1"]
    return [*start, *argv, *own]
