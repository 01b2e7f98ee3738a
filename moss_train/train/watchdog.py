"""A process on each machine that ends a job that hangs, and says who hangs where.

It reads the signs of life of the machine's ranks (heartbeat.py). Where one gives none for
`hardware.hang_s` seconds, the ranks have their Python stacks written, all machines put what they
see into `hangs/` of the run folder, each names the ranks that are furthest behind, and kills its
own: torchrun starts them again if it may.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from data_pipeline.atomic import write_atomically
from data_pipeline.tables import format_table
from moss_train.config import Config
from moss_train.processes import stat_fields
from moss_train.storage import or_warning
from moss_train.train import flight_recorder, heartbeat
from moss_train.train.heartbeat import Beat

SLOW = ("start", "load", "save")  # they may take LONGER times as long
LONGER = 5
NAMED = 60.0  # seconds of silence after which a line says who is late
OTHERS = 10.0  # seconds in which the other machines must have told what they see
STACKS = 2.0  # seconds in which a rank must have written its stacks
HANGS, REPORT = "hangs", "report.txt"  # in a run folder; in one of its folders
STOPPED = "stopped by a signal"  # a process, not running


@contextmanager
def watched(config: Config) -> Iterator[None]:
    """A job's time under a watchdog, on ranks of torchrun's. Begins before any thread."""
    folder = heartbeat.folder_of_job()
    if folder is None or config.hardware.hang_s is None:
        yield
        return
    with ExitStack() as opened:
        with or_warning(folder, "nobody watches this rank"):
            folder.mkdir(exist_ok=True)
            flight_recorder.prepare(folder)
            if os.environ["LOCAL_RANK"] == "0":
                opened.callback(_end, _start(folder, config.hardware.hang_s), folder)
            rank = int(os.environ["RANK"])
            heartbeat.start(folder, rank)
            opened.callback(heartbeat.stop)
            stacks = opened.enter_context((folder / heartbeat.STACK_FILE.format(rank)).open("w"))
            faulthandler.register(signal.SIGUSR2, stacks)
            opened.callback(faulthandler.unregister, signal.SIGUSR2)
        yield


def tell_run_folder(run: Path) -> None:
    """Tells each machine's watchdog where it leaves what it sees: in a folder of this start of the
    job, the same for all machines. A collective."""
    started = [time.strftime("%Y%m%d-%H%M%S")]
    dist.broadcast_object_list(started, src=0)
    folder = heartbeat.folder_of_job()
    if folder is not None and folder.is_dir() and os.environ["LOCAL_RANK"] == "0":
        with or_warning(folder, "the stacks of ranks that hang stay on their machine"):
            (folder / heartbeat.RUN_FILE).write_text(str(run.absolute() / HANGS / started[0]))


def _start(folder: Path, hang_s: float) -> int:
    parent, launcher = os.getpid(), os.getppid()
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        watch(folder, hang_s, parent, launcher)
    finally:
        os._exit(0)


def _end(guard: int, folder: Path) -> None:
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    shutil.rmtree(folder, ignore_errors=True)


def watch(folder: Path, hang_s: float, parent: int, launcher: int) -> None:
    """The watchdog's work, until `parent`, the rank that has started it, has gone."""
    ran, told = time.monotonic(), False  # the launcher, as far as is known; who is late
    while os.getppid() == parent:
        time.sleep(min(1.0, hang_s / 4))
        ran = wake(launcher, ran, hang_s)
        beats = heartbeat.read(folder)
        late = bool(silent(beats, NAMED, time.monotonic()))
        if late and not told:
            said = furthest_behind(_seen(beats))
            print(f"no sign of life for {NAMED:g} s: {said}", file=sys.stderr, flush=True)
        told = late
        if silent(beats, hang_s, time.monotonic()):
            end_job(folder, beats, hang_s, parent)
            break
    shutil.rmtree(folder, ignore_errors=True)


def wake(launcher: int, ran: float, hang_s: float) -> float:
    """Continues a launcher that is stopped for longer than `hang_s`: it would not notice that its
    ranks have ended. `ran`: when it was seen running; now, where it runs."""
    if _state(launcher) != STOPPED:
        return time.monotonic()
    if time.monotonic() - ran > hang_s:
        print(f"the launcher, process {launcher}, is stopped: it is continued", file=sys.stderr)
        os.kill(launcher, signal.SIGCONT)
    return ran


def silent(beats: list[Beat], hang_s: float, now: float) -> list[Beat]:
    """The ranks that have given no sign of life for too long."""
    return [
        beat
        for beat in beats
        if now - beat.at > hang_s * (LONGER if beat.doing in SLOW else 1) and _runs(beat.pid)
    ]


def end_job(folder: Path, beats: list[Beat], hang_s: float, parent: int) -> None:
    """Writes down what this machine sees, names who is behind, and kills its ranks: also where
    nothing can be written."""
    ranks = [beat.rank for beat in beats]
    flight_recorder.ask(folder, ranks)
    for beat in beats:
        with suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGUSR2)  # faulthandler's
    time.sleep(STACKS)
    out = _folder_of_hang(folder)
    seen = everywhere = _seen(beats)
    with or_warning(out, "the job is ended without it"):
        out.mkdir(parents=True, exist_ok=True)
        # By machine; several "machines" of a test may be one.
        write_atomically(out / f"machine_{ranks[0]:05d}.json", json.dumps(seen, indent=1))
        for row in seen:
            stack = folder / heartbeat.STACK_FILE.format(row["rank"])
            text = stack.read_text(errors="replace") if stack.exists() else ""
            (out / f"rank_{row['rank']:05d}.txt").write_text(
                f"process {row['pid']}, {row['state']}\n{text or 'it wrote no stacks'}\n"
            )
        flight_recorder.collect(folder, ranks, out)
        time.sleep(min(OTHERS, hang_s))
        machines = sorted(out.glob("machine_*.json"))
        everywhere = [row for path in machines for row in json.loads(path.read_text())]
        # Each machine writes it, the last one with what all have seen.
        write_atomically(out / REPORT, report(everywhere, hang_s))
    print(f"{verdict(everywhere, hang_s)}; stacks: {out}", file=sys.stderr, flush=True)
    for pid in sorted((beat.pid for beat in beats), key=lambda pid: pid == parent):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _seen(beats: list[Beat]) -> list[dict]:
    """What this machine sees of its ranks, as `furthest_behind` takes it."""
    now, host = time.monotonic(), socket.gethostname()
    return [
        asdict(beat) | {"host": host, "silent_s": now - beat.at, "state": _state(beat.pid)}
        for beat in beats
    ]


def report(seen: list[dict], hang_s: float) -> str:
    """`verdict`, and where each rank is."""
    rows = [("rank", "machine", "step", "doing", "silent s", "process")]
    rows += [
        (str(row["rank"]), row["host"], str(row["step"]), row["doing"], f"{row['silent_s']:.0f}",
         f"{row['pid']}, {row['state']}")
        for row in sorted(seen, key=lambda row: (row["step"], row["count"], row["rank"]))
    ]  # fmt: skip
    return f"{verdict(seen, hang_s)}\n\n{format_table(rows, 'rlrlrl')}\n"


def verdict(seen: list[dict], hang_s: float) -> str:
    """That the job hangs, and who is behind, in a line."""
    return f"the job hangs (hardware.hang_s={hang_s:g}): {furthest_behind(seen)}"


def furthest_behind(seen: list[dict]) -> str:
    """Which ranks are; of several the ones that are stopped.

    seen: of each rank what `Beat` has, its `host`, `silent_s`, and the `state` of its process.
    """
    least = min((row["step"], row["count"]) for row in seen)
    late = [row for row in seen if (row["step"], row["count"]) == least]
    late = [row for row in late if row["state"] == STOPPED] or late
    where = ", ".join(
        f"rank {row['rank']} on {row['host']} (step {row['step']}, {row['doing']}, silent for "
        f"{row['silent_s']:.0f} s, {row['state']})"
        for row in sorted(late, key=lambda row: row["rank"])[:8]
    )
    more = f" and {len(late) - 8} more" if len(late) > 8 else ""
    return f"furthest behind: {where}{more}"


def _folder_of_hang(folder: Path) -> Path:
    """In the run folder, as rank 0 has named it; in `folder` before it is known."""
    told = folder / heartbeat.RUN_FILE
    return Path(told.read_text()) if told.exists() else folder / HANGS


def _runs(pid: int) -> bool:
    return _state(pid) not in ("gone", "ended")


def _state(pid: int) -> str:
    """What the system says of a process."""
    try:
        letter = stat_fields(pid)[0]
    except OSError:
        return "gone"
    words = {"T": STOPPED, "D": "waits for a device", "S": "waits", "R": "runs"}
    return {"Z": "ended", "X": "ended"}.get(letter) or words.get(letter, letter)
