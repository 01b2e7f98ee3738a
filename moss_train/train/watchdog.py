"""A process on each machine that ends a job that hangs, and says who hangs where.

It reads the signs of life of the machine's ranks (heartbeat.py). Where one has given none for too
long (hang_detection.py), the ranks have their Python stacks written, each machine puts what it sees
into `hangs/` of the run folder, names the ranks that are furthest behind, and kills its own:
torchrun starts them again if it may. On several machines they decide by what all see (machines.py):
the rank that the others wait for may be anywhere.
"""

from __future__ import annotations

import faulthandler
import math
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from data_pipeline.atomic import write_atomically
from data_pipeline.ranks import ranks_of
from moss_train.config import Config, HardwareConfig
from moss_train.node_folders import claimed, remove_unclaimed
from moss_train.processes import stat_fields
from moss_train.storage import or_warning
from moss_train.train import flight_recorder, heartbeat
from moss_train.train.hang_detection import (
    STOPPED,
    Limits,
    Pace,
    RankStatus,
    describe_late,
    furthest_behind,
    hangs,
    report,
    verdict,
)
from moss_train.train.heartbeat import Heartbeat
from moss_train.train.machines import Machines
from moss_train.train.process import store_of

NAMED = 60.0  # seconds of silence after which a line says who is late, whatever it does
OTHERS = 10.0  # seconds in which the other machines write down what they see
STACKS = 2.0  # seconds in which a rank must have written its stacks
HANGS, REPORT = "hangs", "report.txt"  # in a run folder; in one of its folders


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
            opened.enter_context(claimed(folder))
            flight_recorder.prepare(folder)
            if os.environ["LOCAL_RANK"] == "0":
                remove_unclaimed(folder.parent, f"{heartbeat.FOLDERS}{os.getuid()}-")
                opened.callback(_end, _start(folder, config.hardware), folder)
            rank = int(os.environ["RANK"])
            heartbeat.start(folder, rank)
            opened.callback(heartbeat.stop)
            stacks = opened.enter_context((folder / heartbeat.STACK_FILE.format(rank)).open("w"))
            faulthandler.register(signal.SIGUSR2, stacks)
            opened.callback(faulthandler.unregister, signal.SIGUSR2)
        yield


def share_run_folder(run: Path) -> None:
    """Tells each machine's watchdog where it leaves what it sees: in a folder of this start of the
    job, the same for all machines. A collective."""
    started = [time.strftime("%Y%m%d-%H%M%S")]
    dist.broadcast_object_list(started, src=0)
    folder = heartbeat.folder_of_job()
    if folder is not None and folder.is_dir() and os.environ["LOCAL_RANK"] == "0":
        with or_warning(folder, "the stacks of ranks that hang stay on their machine"):
            (folder / heartbeat.RUN_FILE).write_text(str(run.absolute() / HANGS / started[0]))


def _start(folder: Path, hardware: HardwareConfig) -> int:
    parent, launcher = os.getpid(), os.getppid()
    child = os.fork()
    if child:
        return child
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        assert hardware.hang_s is not None
        machines = Machines.of_job(lambda: store_of(ranks_of(), "watchdogs"))
        watch(folder, Limits(hardware.hang_s, hardware.hang_io_s), parent, launcher, machines)
    finally:
        os._exit(0)


def _end(guard: int, folder: Path) -> None:
    os.kill(guard, signal.SIGKILL)
    os.waitpid(guard, 0)
    wake(os.getppid(), ran=-math.inf)
    shutil.rmtree(folder, ignore_errors=True)


def watch(folder: Path, limits: Limits, parent: int, launcher: int, machines: Machines) -> None:
    """The watchdog's work, until `parent`, the rank that has started it, has gone."""
    pace = Pace()
    launcher_ran, named = time.monotonic(), False  # `named`: who is late has been printed
    while os.getppid() == parent:
        time.sleep(min(1.0, limits.step_s / 4))
        launcher_ran = wake(launcher, launcher_ran, limits.step_s)
        beats = heartbeat.read(folder)
        pace.add(beats, time.monotonic())
        limits = replace(limits, usual_step_s=pace.usual_step_s)
        own = _statuses(beats)
        machines.publish(own)
        if not own:
            continue
        late = max(rank.silent_s for rank in own) > NAMED
        if late and not named:
            _name_late(own, machines.all())
        named = late
        if machines.hang or (hangs(own, limits) and hangs(machines.all(), limits)):
            end_job(folder, machines, limits, parent)
            break
    wake(launcher, ran=-math.inf)  # nobody will later
    shutil.rmtree(folder, ignore_errors=True)


def wake(launcher: int, ran: float, hang_s: float = 0.0) -> float:
    """Continues a launcher that is stopped for longer than `hang_s`: it would not notice that its
    ranks have ended. `ran`: when it was seen running; now, where it runs."""
    if _state(launcher) != STOPPED:
        return time.monotonic()
    if time.monotonic() - ran > hang_s:
        print(f"the launcher, process {launcher}, is stopped: it is continued", file=sys.stderr)
        with suppress(ProcessLookupError):
            os.kill(launcher, signal.SIGCONT)
    return ran


def _name_late(own: Sequence[RankStatus], everywhere: Sequence[RankStatus]) -> None:
    """Prints who is late, on the machine of the rank that is furthest behind."""
    hosts = {rank.host for rank in furthest_behind(everywhere)}
    if own[0].host in hosts:
        line = f"no sign of life for {NAMED:g} s: {describe_late(everywhere)}"
        print(line, file=sys.stderr, flush=True)


def end_job(folder: Path, machines: Machines, limits: Limits, parent: int) -> None:
    """Writes down what this machine sees, names who is behind, and kills its ranks: also where
    nothing can be written."""
    beats = heartbeat.read(folder)
    own, ranks = _statuses(beats), [beat.rank for beat in beats]
    machines.publish(own)
    flight_recorder.request_dumps(folder, ranks)
    for beat in beats:
        with suppress(ProcessLookupError):
            os.kill(beat.pid, signal.SIGUSR2)  # faulthandler's
    everywhere = machines.publish_hang()
    time.sleep(STACKS)
    out = _folder_of_hang(folder)
    with or_warning(out, "the job is ended without it"):
        out.mkdir(parents=True, exist_ok=True)
        for rank in own:
            stack = folder / heartbeat.STACK_FILE.format(rank.rank)
            text = stack.read_text(errors="replace") if stack.exists() else ""
            (out / f"rank_{rank.rank:05d}.txt").write_text(
                f"process {rank.pid}, {rank.state}\n{text or 'it wrote no stacks'}\n"
            )
        flight_recorder.collect(folder, ranks, out)
        # Each machine writes it: the store may not answer one of them.
        write_atomically(out / REPORT, report(everywhere, limits.step_s))
    print(f"{verdict(everywhere, limits.step_s)}; stacks: {out}", file=sys.stderr, flush=True)
    if len(everywhere) > len(own):
        time.sleep(OTHERS)  # their ranks end when ours do, before they have told where they are
    for pid in sorted((beat.pid for beat in beats), key=lambda pid: pid == parent):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _statuses(beats: list[Heartbeat]) -> list[RankStatus]:
    """What this machine sees of its ranks."""
    now, host = time.monotonic(), socket.gethostname()
    return [
        RankStatus(beat.rank, host, beat.pid, beat.step, beat.count, beat.doing, now - beat.at,
             _state(beat.pid))
        for beat in beats
    ]  # fmt: skip


def _folder_of_hang(folder: Path) -> Path:
    """Where this machine writes what it sees: the folder that rank 0 has named in the run folder;
    one in `folder` before that name is known."""
    pointer = folder / heartbeat.RUN_FILE
    return Path(pointer.read_text()) if pointer.exists() else folder / HANGS


def _state(pid: int) -> str:
    """What the system says of a process."""
    try:
        letter = stat_fields(pid)[0]
    except OSError:
        return "gone"
    words = {"T": STOPPED, "D": "waits for a device", "S": "waits", "R": "runs"}
    return {"Z": "ended", "X": "ended"}.get(letter) or words.get(letter, letter)
