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
KEY = "MOSS_API_KEY"  # environment variable with the API key of a server; it may be missing
_ADDRESS = re.compile(r"https?://[\w.\[\]:]+:\d+(?=/)")
_START, _STOP = 1800.0, 30.0  # seconds: an 11B model is read from a slow disk; a clean end
_LOOK, _PATIENCE = 0.2, 10.0
# Seconds between looks at a server that is not ours, and without an answer after which it has gone.
_ASK, _GONE = 5.0, 30.0


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
        """Arguments of `python -m inference.serve`. Its default limits are for clients that are not
        trusted: a benchmark's pictures and videos are larger."""
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
                env={**os.environ, "MOSS_END_WITH_PARENT": str(os.getpid())},
            )
        try:
            self.url = self._wait()
            self.resolution = resolution(self.url)
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


class Elsewhere:
    """A server that somebody else runs. gone: seconds without an answer after which it counts as
    ended; every: seconds between two looks."""

    def __init__(self, url: str, gone: float = _GONE, every: float = _ASK) -> None:
        """BenchmarkError: no server answers there."""
        self.url, self._gone, self._every = base_of(url), gone, every
        self._looked = self._answered = time.monotonic()
        if not healthy(self.url):
            raise BenchmarkError(f"{url}: no server answers there")
        self.resolution = resolution(self.url)

    def check(self) -> None:
        """BenchmarkError, if it has ended."""
        if time.monotonic() - self._looked < self._every:
            return
        if answers(self.url):
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > self._gone:
            raise BenchmarkError(f"{self.url}: the server has not answered for {self._gone:g} s")
        self._looked = time.monotonic()


def last_words(log: Path) -> str:
    """The last line that a process wrote into its log."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
    return f"{lines[-1]:.300}"


def base_of(url: str) -> str:
    """A server's address, whether it was given with `/v1` or without."""
    return url.rstrip("/").removesuffix("/v1")


def healthy(url: str) -> bool:
    """Whether a server answers at an address that it can be asked."""
    return _status(url) == 200


def answers(url: str) -> bool:
    """Whether there is a server at an address, be it a busy one."""
    return _status(url) is not None


def resolution(url: str) -> str:
    """Pixels of each picture and frame as the model sees it; empty: the server does not say."""
    try:
        tile = httpx.get(f"{url}/health", timeout=_PATIENCE).json().get("tile")
    except (httpx.HTTPError, ValueError, AttributeError):
        tile = None
    return f"{tile} x {tile}" if tile else ""


def _status(url: str) -> int | None:
    try:
        return httpx.get(f"{url}/health", timeout=_PATIENCE).status_code
    except (httpx.HTTPError, httpx.InvalidURL):
        return None


def _tile(checkpoint: Path) -> int:
    path = checkpoint / "config.json"
    try:
        return int(json.loads(path.read_text())["vision_config"]["image_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = f"{path}: {type(error).__name__}: {error}: give the folder of an export"
        raise BenchmarkError(words) from None
