"""The server of a run: `inference.serve` on an export, as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import httpx

from inference.evaluate.results import BenchmarkError

MODEL = "moss-video"  # its name in requests
_ADDRESS = re.compile(r"https?://[\w.\[\]:]+:\d+(?=/)")
_START, _STOP = 1800.0, 30.0  # seconds: an 11B model is read from a slow disk; a clean end
_LOOK = 0.2


@dataclass(frozen=True)
class Serving:
    """How an export is served.

    frames: of a question, at most. concurrency: questions at once, of each replica. media: folders
    whose files may be named. flags: more of the server's own, which override these.
    """

    checkpoint: Path
    frames: int
    concurrency: int = 4
    replicas: int = 0
    media: Sequence[Path] = ()
    flags: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """Of `python -m inference.serve`. Its limits are for clients that are not trusted: a
        benchmark's pictures and videos are larger."""
        tile = _tile(self.checkpoint)
        held = 4 * (self.concurrency + 1) * (self.frames * 3 * tile * tile + 2**28)
        limits = {
            "frames": self.frames, "pixels": 2**28, "frame_bytes": 2**28, "body_bytes": 2**29,
            "memory": 2**33, "held": held, "clip_cpu": 3600, "clip_wall": 3600,
            "prompt_chars": 100_000, "decoders": max(2, self.concurrency),
        }  # fmt: skip
        return [
            "--checkpoint", str(self.checkpoint), "--port", "0",
            "--window", str(max(self.frames, 16)), "--max_context", str(8192 + 2 * self.frames),
            "--max_sessions", str(self.concurrency), "--replicas", str(self.replicas),
            *(word for folder in self.media for word in ("--allow_media", str(folder))),
            *(word for name, value in limits.items() for word in (f"--limit_{name}", str(value))),
            *self.flags,
        ]  # fmt: skip


class Server:
    """A server that runs while its `with` does. Its output goes to a file."""

    def __init__(self, serving: Serving, log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "inference.serve", *serving.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "MOSS_END_WITH_PARENT": "1"},
            )
        try:
            self.url = self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> str:
        """The address, once it answers there. BenchmarkError: it ended, or took too long."""
        until = time.monotonic() + _START
        while time.monotonic() < until:
            self.check()
            found = _ADDRESS.search(self._log.read_text(errors="replace"))
            if found and healthy(found[0]):
                return found[0]
            time.sleep(_LOOK)
        raise BenchmarkError(f"the server has not answered within {_START:g} s: see {self._log}")

    def check(self) -> None:
        """BenchmarkError with its last words, if it has ended."""
        code = self._process.poll()
        if code is not None:
            raise BenchmarkError(f"the server ended with code {code}: {last_words(self._log)}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def last_words(log: Path) -> str:
    """The last line that a process wrote into its log."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
    return f"{lines[-1]:.300}"


def healthy(url: str) -> bool:
    """Whether a server answers at an address."""
    try:
        return httpx.get(f"{url}/health", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def _tile(checkpoint: Path) -> int:
    path = checkpoint / "config.json"
    try:
        return int(json.loads(path.read_text())["vision_config"]["image_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = f"{path}: {type(error).__name__}: {error}: give the folder of an export"
        raise BenchmarkError(words) from None
