"""Starts the server of a run, `inference.serve` in a process of its own, or watches another."""

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
from typing import Any

import httpx

from inference.evaluate.results import BenchmarkError

MODEL = "moss-video"  # its name in requests
KEY = "MOSS_API_KEY"  # environment variable with the API key of a server; it may be missing
_ADDRESS = re.compile(r"https?://[\w.\[\]:]+:\d+(?=/)")
# Seconds: to start, with an 11B model on a slow disk; to stop by itself.
_START, _STOP = 1800.0, 30.0
_LOOK, _PATIENCE = 0.2, 10.0  # seconds: between looks at a start; for an answer
# A server that somebody else runs is looked at every _ASK seconds, and has gone after _GONE seconds
# without an answer.
_ASK, _GONE = 5.0, 30.0


@dataclass(frozen=True)
class Serving:
    """How an export is served."""

    checkpoint: Path
    frames: int  # of a question at most
    concurrency: int = 4  # questions at a time, of each replica
    replicas: int = 0
    media: Sequence[Path] = ()  # folders of files that requests may name
    flags: Sequence[str] = ()  # further flags of the server, which override these

    def arguments(self) -> list[str]:
        """Arguments of `python -m inference.serve`, with limits above its defaults: those are for
        clients that are not trusted, and a benchmark's pictures and videos are larger."""
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
    """A server that runs while its `with` block does. Its output goes to a file."""

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
        """Waits until the server answers; its address. BenchmarkError: it ended, or is too slow."""
        until = time.monotonic() + _START
        while time.monotonic() < until:
            self.check()
            found = _ADDRESS.search(self._log.read_text(errors="replace"))
            if found and healthy(found[0]):
                return found[0]
            time.sleep(_LOOK)
        raise BenchmarkError(f"the server has not answered within {_START:g} s: see {self._log}")

    def check(self) -> None:
        """Raises BenchmarkError with the log's last line if the server has ended."""
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


class ExternalServer:
    """A server that somebody else runs. It is looked at every `every` seconds, and counts as ended
    after `gone` seconds without an answer, or with other weights."""

    def __init__(self, url: str, gone: float = _GONE, every: float = _ASK) -> None:
        """Raises BenchmarkError where no server answers."""
        self.url, self._gone, self._every = base_of(url), gone, every
        self._looked = self._answered = time.monotonic()
        if not healthy(self.url):
            raise BenchmarkError(f"{url}: no server answers there")
        self.resolution, self.weights = resolution(self.url), weights_at(self.url)

    def check(self) -> None:
        """Raises BenchmarkError if the server has ended, or serves other weights."""
        if time.monotonic() - self._looked < self._every:
            return
        if answers(self.url):
            check_weights(self.url, self.weights)
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > self._gone:
            raise BenchmarkError(f"{self.url}: the server has not answered for {self._gone:g} s")
        self._looked = time.monotonic()


def last_words(log: Path) -> str:
    """The last line that a process wrote into its log."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no word"]
    return f"{lines[-1]:.300}"


def base_of(url: str) -> str:
    """A server's address without `/v1`."""
    return url.rstrip("/").removesuffix("/v1")


def healthy(url: str) -> bool:
    """Whether the server at an address says that it serves."""
    return _status(url) == 200


def answers(url: str) -> bool:
    """Whether a server at an address answers at all, though it may be busy."""
    return _status(url) is not None


def resolution(url: str) -> str:
    """The size of the model's pictures and frames (`560 x 560`); "": the server does not say."""
    tile = (_health(url) or {}).get("tile")
    return f"{tile} x {tile}" if tile else ""


def weights_at(url: str) -> str:
    """What the server says of its model's weights: a digest of them (`/health` of ours), else the
    name of its model in `/v1/models`; "": it says neither, or does not answer."""
    health = _health(url)
    if health is None or health.get("weights"):
        return str(health["weights"]) if health else ""
    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        listed = httpx.get(f"{url}/v1/models", headers=headers, timeout=_PATIENCE).json()
        cards = listed["data"]  # in any order, where a server has several
        card = next((card for card in cards if card.get("id") == MODEL), cards[0])
        return " ".join(str(card[name]) for name in ("id", "root") if card.get(name))
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
        return ""


def check_weights(url: str, wanted: str) -> None:
    """Raises BenchmarkError where the server says that it has other weights than `wanted` (empty:
    any)."""
    found = weights_at(url) if wanted else ""
    if found and found != wanted:
        raise BenchmarkError(
            f"{url}: serves other weights ({found}) than those that the run was begun with"
            f" ({wanted})"
        )


def _health(url: str) -> dict[str, Any] | None:
    """What a server says of itself; None: it does not answer."""
    try:
        said = httpx.get(f"{url}/health", timeout=_PATIENCE).json()
    except httpx.HTTPError:
        return None
    except ValueError:  # another program's server
        return {}
    return said if isinstance(said, dict) else {}


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
