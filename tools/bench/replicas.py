"""Checks sessions behind replicas that are killed: whether a word is lost, how long sessions are
away.

python -m tools.bench.replicas --checkpoint DIR [--sessions 60 --replicas 3 --kill_every 20]

Clients send a frame, wait for its decision, and ask every few frames; sources are files with greedy
decoding, so what is said does not depend on time. Each session's events are compared with those of
the same frames in one process without a server. In the end another client measures, by turns, the
way of a frame to its decision through the front, and straight to a replica.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image
from websockets.asyncio.client import connect, unix_connect

from data_pipeline.commands import DONE, FAILED, CommandParser, report_error
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.session.runner import Runner

PROGRAM = "python -m tools.bench.replicas"
FRONT_KEY = secrets.token_urlsafe(16)
ASK_EVERY = 5  # frames
PACE, BIAS, LONGEST = 4, 4.0, 9  # of each session: little is said, and often
LONGEST_SILENCE = 600.0  # seconds without an event, after which none is waited for
# What is compared: types of events, and their fields.
COMPARED_TYPES = (
    "conversation.item.created", "input_frame.processed", "response.output_text.delta",
    "response.done", "session.state", "input_frame.dropped", "session.evicted", "error",
)  # fmt: skip
FIELDS = ("text", "frame_at", "decision", "delta", "status", "reason", "state", "code", "count")
ComparedEvents = list[tuple[str, list[Any]]]


def picture(session: int, frame: int) -> bytes:
    """A JPEG of noise."""
    noise = np.random.default_rng([session, frame]).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def question(session: int, frame: int) -> str | None:
    if frame % ASK_EVERY != session % ASK_EVERY:
        return None
    return f"What is new since second {frame - 1}?"


def compared(events: Sequence[dict[str, Any]]) -> ComparedEvents:
    return [
        (e["type"], [e.get(name) for name in FIELDS]) for e in events if e["type"] in COMPARED_TYPES
    ]


def undisturbed(runner: Runner, session: int, frames: int) -> ComparedEvents:
    """The events of a session in one process, which is given its frames one after the other."""
    with runner.session(
        live=False, clock="media", pace=PACE, max_new_tokens=LONGEST,
        sampling=Sampling(silence_bias=BIAS, seed=session),
    ) as handle:  # fmt: skip
        for frame in range(frames):
            handle.put_frame(picture(session, frame), float(frame), question(session, frame))
        handle.end()
        return compared([event.as_dict() for event in handle.events()])


@dataclass
class Client:
    """A session over a socket; each frame is sent when the one before it is decided."""

    number: int
    url: str
    interval: float = 0.0  # least seconds between two frames
    path: str = ""  # Unix socket of a replica, which it asks in place of the front
    events: list[dict[str, Any]] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # when each event came
    frame_seconds: list[float] = field(default_factory=list)
    frames: int = 0

    async def run(self, stop: Callable[[int], bool]) -> Client:
        """Sends frames until `stop(frames)`."""
        async with self._connect() as socket:
            settings = {
                "source": "file", "pace": PACE, "silence_bias": BIAS, "seed": self.number,
                "max_output_tokens": LONGEST,
            }  # fmt: skip
            await socket.send(json.dumps({"type": "session.update", "session": settings}))
            while not stop(self.frames):
                began = time.monotonic()
                second, prompt = float(self.frames), question(self.number, self.frames)
                about = {"ts": second, "prompt": prompt}
                await socket.send(json.dumps({"type": "input_image_buffer.append", **about}))
                await socket.send(picture(self.number, self.frames))
                self.frames += 1
                while not self._decided(await self._next(socket), second):
                    pass
                took = time.monotonic() - began
                self.frame_seconds.append(took)
                await self._listen(socket, max(0.0, self.interval - took))
            await socket.send(json.dumps({"type": "input_image_buffer.end"}))
            while (await self._next(socket))["type"] != "session.closed":
                pass
        return self

    def _connect(self) -> Any:
        options: dict[str, Any] = {"max_size": None, "compression": None, "open_timeout": 60}
        if not self.path:
            return connect(self.url, **options)
        key = {"Authorization": f"Bearer {FRONT_KEY}"}
        return unix_connect(self.path, self.url, additional_headers=key, **options)

    async def _listen(self, socket: Any, seconds: float) -> None:
        """Reads events for so many seconds, so that an event counts when it comes, not when it is
        used."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self._next(socket)

    @staticmethod
    def _decided(event: dict[str, Any], second: float) -> bool:
        return event["type"] == "input_frame.processed" and event["frame_at"] == second

    async def _next(self, socket: Any) -> dict[str, Any]:
        async with asyncio.timeout(LONGEST_SILENCE):
            event: dict[str, Any] = json.loads(await socket.recv())
        self.events.append(event)
        self.at.append(time.monotonic())
        return event

    @property
    def gaps(self) -> int:
        """The number of events that are missing, or came twice."""
        numbers = [event["seq"] for event in self.events]
        return sum(a != b for a, b in zip(numbers, range(1, len(numbers) + 1), strict=True))

    def count(self, type: str) -> int:
        return sum(event["type"] == type for event in self.events)


@dataclass
class Kill:
    """A replica that was killed, and how long its sessions were away."""

    at: float
    sessions: int
    away: list[float] = field(default_factory=list)


class Drill:
    """A front with replicas, its clients, and the kills."""

    def __init__(self, host: str) -> None:
        self.host, self.kills = host, list[Kill]()

    @property
    def url(self) -> str:
        return f"ws://{self.host}/v1/realtime"

    def replicas(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"http://{self.host}/admin/replicas", timeout=60)
        found: list[dict[str, Any]] = answer.json()["replicas"]
        return found

    def wait_ready(self, count: int, seconds: float = 300.0) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(httpx.HTTPError):
                if sum(r["state"] == "ready" for r in self.replicas()) >= count:
                    return
            time.sleep(0.2)
        raise TimeoutError(f"{count} replicas are not ready after {seconds:g} s")

    async def kill_every(self, seconds: float, until: float) -> None:
        """Kills the replica with the most sessions, where another one is ready."""
        while time.monotonic() + seconds < until:
            await asyncio.sleep(seconds)
            await self.kill()

    async def kill(self, least: int = 2) -> None:
        """Kills the replica with the most sessions, if so many replicas are ready; returns when the
        front knows of it."""
        ready = [r for r in await asyncio.to_thread(self.replicas) if r["state"] == "ready"]
        if len(ready) >= least:
            victim = max(ready, key=lambda replica: replica["sessions"])
            os.kill(victim["pid"], signal.SIGKILL)
            self.kills.append(Kill(time.monotonic(), victim["sessions"]))
            while victim["pid"] in [r["pid"] for r in await asyncio.to_thread(self.replicas)]:
                await asyncio.sleep(0.02)

    async def play(
        self, sessions: int, seconds: float, interval: float, kill_every: float
    ) -> list[Client]:
        """Runs all sessions at once for so many seconds."""
        began = time.monotonic()
        until = began + seconds
        clients = [Client(n, self.url, interval) for n in range(sessions)]

        async def one(client: Client) -> Client:
            await asyncio.sleep(interval * client.number / sessions)
            return await client.run(lambda frames: time.monotonic() > until)

        killing = asyncio.create_task(self.kill_every(kill_every, until))
        done = await asyncio.gather(*(one(client) for client in clients))
        await killing
        for client in done:
            for event, at in zip(client.events, client.at, strict=True):
                if event["type"] == "session.resumed":
                    kill = [kill for kill in self.kills if kill.at < at][-1]
                    kill.away.append(at - kill.at)
        return done


@contextlib.contextmanager
def serving(args: Sequence[str], port: int) -> Iterator[Drill]:
    """Starts a front with its replicas."""
    check_free(PROGRAM, port)
    command = [sys.executable, "-m", "inference.serve", "--port", str(port), *args]
    process = subprocess.Popen(command, env={**os.environ, "MOSS_FRONT_KEY": FRONT_KEY})
    try:
        yield Drill(f"127.0.0.1:{port}")
    finally:
        stop(process)


def check_free(program: str, port: int) -> None:
    """Ends the command where a server has this port: that one would be measured."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            words = f"--port {port}: another server listens there: end it, or give another port"
            raise SystemExit(report_error(program, words))


def stop(process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Asks a server to end; kills one that does not within so many seconds."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def ways(drill: Drill, rounds: int = 5, frames: int = 20) -> tuple[list[float], list[float]]:
    """Seconds from a frame to its decision, by turns through the front and straight to a replica,
    while no other client is served."""
    ready = next(r for r in await asyncio.to_thread(drill.replicas) if r["state"] == "ready")
    path = ready["address"].removeprefix("unix:")
    through, straight = list[float](), list[float]()
    sides = [("", through), (path, straight)]
    for number in range(rounds):
        for way, found in sides if number % 2 == 0 else sides[::-1]:
            client = await Client(0, drill.url, path=way).run(lambda count: count == frames)
            found += client.frame_seconds[1:]
    return through, straight


def differing(clients: Sequence[Client], runner: Runner) -> list[int]:
    """The sessions whose events differ from the undisturbed ones."""

    def differs(client: Client) -> bool:
        return compared(client.events) != undisturbed(runner, client.number, client.frames)

    with ThreadPoolExecutor(runner.engine.max_sessions) as pool:
        found = list(pool.map(differs, clients))
    return [client.number for client, wrong in zip(clients, found, strict=True) if wrong]


def share(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


def milliseconds(values: Sequence[float]) -> list[float]:
    """The median and p99 of seconds, in milliseconds."""
    return [round(1000 * share(values, percent), 1) for percent in (50, 99)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="an export")
    parser.add_argument("--replicas", type=int, default=3, metavar="N", help="replicas")
    parser.add_argument("--sessions", type=int, default=60, metavar="N", help="clients at once")
    parser.add_argument("--seconds", type=float, default=180.0, metavar="S", help="how long")
    parser.add_argument("--interval", type=float, default=4.0, metavar="S",
                        help="least seconds between two frames of a session")  # fmt: skip
    parser.add_argument("--kill_every", type=float, default=20.0, metavar="S",
                        help="seconds between two kills")  # fmt: skip
    parser.add_argument("--port", type=int, default=8790, metavar="N", help="of the front")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    window = 2 * int(args.seconds / max(args.interval, 0.1)) + 8  # nothing is dropped
    engine = ["--checkpoint", args.checkpoint, "--device", "cpu", "--window", str(window)]
    engine += ["--max_context", str(64 * window), "--max_sessions", str(args.sessions)]
    front = [*engine, "--replicas", str(args.replicas), "--limit_decoders", "1"]
    with serving(front, args.port) as drill:
        drill.wait_ready(args.replicas)
        playing = drill.play(args.sessions, args.seconds, args.interval, args.kill_every)
        clients = asyncio.run(playing)
        drill.wait_ready(args.replicas)
        through, straight = asyncio.run(ways(drill))
    made = load_engine(
        args.checkpoint, device="cpu", window=window, max_tokens=64 * window, max_sessions=8
    )
    with Runner(made) as runner:
        wrong = differing(clients, runner)
    away = [seconds for kill in drill.kills for seconds in kill.away]
    rows = {
        "sessions": len(clients),
        "frames": sum(client.frames for client in clients),
        "words told (events compared)": sum(len(compared(client.events)) for client in clients),
        "kills": len(drill.kills),
        "sessions moved": sum(kill.sessions for kill in drill.kills),
        "session.resumed": sum(client.count("session.resumed") for client in clients),
        "away p50, p99, max (s)": [round(share(away, p), 2) for p in (50, 99, 100)],
        "events lost or twice": sum(client.gaps for client in clients),
        "sessions that differ": len(wrong),
        "decision p50, p99 with all (ms)": milliseconds(
            [seconds for client in clients for seconds in client.frame_seconds]
        ),
        "decision alone, through the front": milliseconds(through),
        "decision alone, straight to it": milliseconds(straight),
    }
    for name, value in rows.items():
        print(f"{name:32} {value}")
    if not drill.kills:
        return report_error(PROGRAM, "no replica was killed: give more --seconds or --replicas")
    return FAILED if wrong or any(client.gaps for client in clients) else DONE


if __name__ == "__main__":
    raise SystemExit(main())
