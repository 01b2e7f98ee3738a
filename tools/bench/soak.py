"""Checks whether a server stays as it was under clients that break off, send garbage and leave.

python -m tools.bench.soak --checkpoint DIR [--frames 10000 --sessions 20]

Sessions send frames and wait for the decision on each: first undisturbed, then with faults at
random (visitor.py). Memory is that of all processes of the server (PSS: a page that several share
counts once), from after the warm-up, the first fifth of the frames with faults, to the end. The
exit code says whether memory has grown by no more than 5 %, the p99 of frame to decision is at most
1.5 times the undisturbed one, and nothing was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from data_pipeline.commands import DONE, FAILED, CommandParser, report_error
from tools.bench.replicas import check_free, milliseconds, share, stop
from tools.bench.visitor import Visitor

PROGRAM = "python -m tools.bench.soak"
GROWTH, SLOWER = 0.05, 1.5  # what is still flat, and still as fast
WARM = 0.2  # of the frames with faults
_LOOK = 2.0  # seconds between two measures of memory
FRAME_BYTES = 2**17  # the server's limit here: frames beyond it are quickly made


@dataclass
class Result:
    """The measurements of one run."""

    visitors: list[Visitor]
    seconds: float
    memory: list[tuple[float, int]] = field(default_factory=list)  # share of the frames, bytes

    @property
    def frames(self) -> int:
        return sum(visitor.frames for visitor in self.visitors)

    @property
    def latencies(self) -> list[float]:
        """Seconds from a frame to its decision."""
        return [seconds for visitor in self.visitors for seconds in visitor.seconds]

    @property
    def faults(self) -> Counter[str]:
        return sum((visitor.faults for visitor in self.visitors), Counter())

    @property
    def gaps(self) -> int:
        """The number of events that are missing, or came twice."""
        return sum(visitor.gaps for visitor in self.visitors)

    @property
    def wrong(self) -> list[str]:
        """What went wrong, a line each."""
        return [words for visitor in self.visitors for words in visitor.wrong]

    def grown(self) -> float:
        """The share by which memory has grown from after the warm-up to the end: medians of a tenth
        of the frames each."""

        def around(begin: float) -> float:
            found = [size for at, size in self.memory if begin <= at <= begin + 0.1]
            return statistics.median(found or [size for _, size in self.memory])

        return around(0.9) / around(WARM) - 1.0


async def play(
    host: str, sessions: int, frames: int, *, faults: float = 0.0, seed: int = 0,
    interval: float = 1.0, pid: int | None = None, frame_bytes: int = FRAME_BYTES,
) -> Result:  # fmt: skip
    """So many sessions at once until together they have sent so many frames.

    Args:
        host: of the server, HOST:PORT.
        faults: how probable one is after each frame.
        interval: least seconds between two frames of a session.
        pid: of the server, whose memory is measured.
        frame_bytes: the server's limit.
    """
    visitors = [
        Visitor(number, host, faults, interval, frame_bytes, random.Random(f"{seed} {number}"))
        for number in range(sessions)
    ]
    result, began = Result(visitors, 0.0), time.monotonic()

    async def one(visitor: Visitor) -> None:
        await asyncio.sleep(interval * visitor.number / sessions)
        await visitor.run(lambda: result.frames >= frames)

    async def look() -> None:
        if pid is not None:
            size = await asyncio.to_thread(memory, pid)
            result.memory.append((result.frames / frames, size))

    async def measure() -> None:
        while True:
            await look()
            await asyncio.sleep(_LOOK)

    measuring = asyncio.create_task(measure())
    try:
        await asyncio.gather(*(one(visitor) for visitor in visitors))
    finally:
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)
    result.seconds = time.monotonic() - began
    await look()
    return result


def memory(pid: int) -> int:
    """Bytes of a process and its children; each counts its share of a shared page (PSS)."""
    server, total = psutil.Process(pid), 0
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Starts a server; yields when it accepts connections."""
    flags = [
        "--checkpoint", args.checkpoint, "--device", args.device, "--port", str(args.port),
        "--max_sessions", str(args.sessions + 4), "--window", "32", "--max_context", "2048",
        "--limit_grace", "15", "--limit_replay", "256", "--limit_frame_bytes", str(FRAME_BYTES),
    ]  # fmt: skip
    check_free(PROGRAM, args.port)
    process = subprocess.Popen([sys.executable, "-m", "inference.serve", *flags])
    host = f"127.0.0.1:{args.port}"
    try:
        wait(lambda: process.poll() is not None or health(host)["status"] == "ok", 600)
        if process.poll() is not None:
            raise SystemExit(report_error(PROGRAM, f"the server ended with {process.returncode}"))
        yield host, process
    finally:
        stop(process)


def health(host: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"http://{host}/health", timeout=60).json()
    return found


def wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Waits until a condition holds; whether it did within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return True
        time.sleep(0.2)
    return False


def report(quiet: Result, broken: Result, left: int, code: int) -> dict[str, Any]:
    """The figures, for JSON. left: sessions that the server still has afterwards. code: its exit
    code."""
    p99 = [share(run.latencies, 99) for run in (quiet, broken)]
    grown, slower = broken.grown(), p99[1] / max(p99[0], 1e-9)
    sizes = [size for at, size in broken.memory if at >= WARM]
    lost = [*broken.wrong, *quiet.wrong]
    figures = {
        "sessions": len(broken.visitors),
        "frames": broken.frames,
        "frames undisturbed": quiet.frames,
        "seconds": round(broken.seconds),
        "faults": sum(broken.faults.values()),
        "faults by kind": dict(sorted(broken.faults.items())),
        "decision p50, p99 undisturbed (ms)": milliseconds(quiet.latencies),
        "decision p50, p99 with faults (ms)": milliseconds(broken.latencies),
        "p99, times the undisturbed": round(slower, 2),
        "memory after the warm-up, least and most (MB)": [
            round(pick(sizes) / 1e6) for pick in (min, max) if sizes
        ],
        "memory grown (%)": round(100 * grown, 1),
        "events lost or twice": broken.gaps + quiet.gaps,
        "went wrong": lost[:20],
        "sessions left afterwards": left,
        "exit code of the server": code,
    }
    held = grown <= GROWTH and slower <= SLOWER
    right = not (lost or broken.gaps or quiet.gaps or left or code)
    return {**figures, "holds": held and right}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(PROGRAM, description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="an export")
    parser.add_argument("--device", default="cpu", metavar="D", help="of the server")
    parser.add_argument("--sessions", type=int, default=20, metavar="N", help="clients at once")
    parser.add_argument("--frames", type=int, default=10_000, metavar="N",
                        help="of all sessions, with faults")  # fmt: skip
    parser.add_argument("--quiet_frames", type=int, default=2000, metavar="N",
                        help="before that, undisturbed")  # fmt: skip
    parser.add_argument("--interval", type=float, default=1.0, metavar="S",
                        help="least seconds between two frames of a session")  # fmt: skip
    parser.add_argument("--faults", type=float, default=0.1, metavar="P",
                        help="probability of a fault after a frame")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults")
    parser.add_argument("--port", type=int, default=8791, metavar="N", help="of the server")
    parser.add_argument("--json", metavar="FILE", help="the figures go there, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with serving(args) as (host, process):
        options: dict[str, Any] = {"interval": args.interval, "seed": args.seed}
        options |= {"pid": process.pid}  # to measure memory takes time, too
        quiet = asyncio.run(play(host, args.sessions, args.quiet_frames, **options))
        options |= {"faults": args.faults}
        broken = asyncio.run(play(host, args.sessions, args.frames, **options))
        wait(lambda: health(host)["sessions"] == 0, 60)
        left = health(host)["sessions"]
    figures = report(quiet, broken, left, process.returncode)
    for name, value in figures.items():
        print(f"{name:48} {value}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
    return DONE if figures["holds"] else FAILED


if __name__ == "__main__":
    raise SystemExit(main())
