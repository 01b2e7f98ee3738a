"""Faults that a job must survive: signals to its processes, damaged files, full and slow
storage."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moss_train.checkpoint_dir import checkpoints_folder, find, read_run, steps_in
from moss_train.train.metrics import read_metrics
from tools.chaos.training import EVERY, Training, kill

SLOW_S = 5.0
FAILED_SAVE = "could not be written"  # says a job
PATIENCE_S = 240.0  # until something comes that must come, on a busy machine
CUT = 600  # bytes of a shard: within its first sample, however small that is
SIZE = 256 << 20  # bytes of the small disk
FULL = "full disk"


class NotSeenError(Exception):
    """The job has not noticed a fault."""


@dataclass(frozen=True)
class Fault:
    """A fault. `inflict` causes it, and raises NotSeenError where the job does not notice it. lost:
    checkpoint intervals that it may cost. early: whether it may also come while the job starts."""

    name: str
    inflict: Callable[[Training, random.Random], None]
    lost: int = 1
    early: bool = False


TARGETS: dict[str, Callable[[Training], list[int]]] = {
    "one rank": Training.ranks,
    "all ranks": Training.ranks,
    "the launcher": lambda job: [job.launcher],
    "a loader worker": Training.workers,
}
ONE = ("one rank", "a loader worker")  # of these
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)


def _until(job: Training, there: Callable[[], object], what: str) -> None:
    """Waits until `there` holds. Raises NotSeenError, with `what`, where it does not."""
    until = time.monotonic() + PATIENCE_S
    while not there():
        if time.monotonic() > until:
            raise NotSeenError(what)
        job.poll()


def _send(number: int, target: str, job: Training, chance: random.Random) -> None:
    _until(job, lambda: TARGETS[target](job), f"{target}: there is no such process")
    pids = TARGETS[target](job)
    kill([chance.choice(pids)] if pids and target in ONE else pids, number)


def while_it_starts(fault: Fault, start_s: float) -> Fault:
    """The fault in a job that starts: kills the launcher, and inflicts `fault` within about
    `start_s` seconds, while the job starts again."""

    def inflict(job: Training, chance: random.Random) -> None:
        launcher = job.launcher
        kill([launcher])
        _until(job, lambda: job.launcher != launcher and job.ranks(), "the job has not started")
        until = time.monotonic() + chance.uniform(0, start_s)
        while time.monotonic() < until:
            job.poll()
        fault.inflict(job, chance)

    return Fault(f"{fault.name}, while the job starts", inflict, fault.lost)


def _damage(job: Training, chance: random.Random) -> None:
    """Kills all processes, and changes a byte of the newest checkpoint."""
    folder = checkpoints_folder(job.run)

    def two_in_a_row() -> bool:  # which a full disk may have prevented
        last = [read_run(path)["step"] for path in steps_in(folder)[-2:]]
        return len(last) == 2 and last[1] - last[0] <= EVERY

    _until(job, two_in_a_row, "there are no two checkpoints in a row")
    kill(job.left())
    time.sleep(0.5)
    newest = find(job.run)
    assert newest is not None
    path = chance.choice(sorted(path for path in newest.rglob("*") if path.stat().st_size > 1))
    with path.open("r+b") as file:
        file.seek(chance.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))


def _truncate(world: Path, job: Training, chance: random.Random) -> None:
    """Cuts off a shard of validation data until a validation has left out a sample."""
    shard, before = chance.choice(sorted(world.glob("*/heldout/*/*.tar"))), job.step

    def noticed() -> bool:
        return any(
            row["step"] > before and (row.get("validation") or {}).get("skipped_samples")
            for row in read_metrics(job.run)
        )

    content = shard.read_bytes()
    os.truncate(shard, CUT)
    try:
        _until(job, noticed, "no validation has left out a sample")
    finally:
        shard.write_bytes(content)


def _fill(job: Training, _chance: random.Random) -> None:
    """Fills the disk until a save has failed, and waits for the next checkpoint."""

    def failed() -> int:
        with suppress(FileNotFoundError):  # a start that has written nothing yet
            return job.log.read_text(errors="replace").count(FAILED_SAVE)
        return 0

    before = failed()
    with _filled(job.run.parent / "filler"):
        # `poll` sees no step: metrics.jsonl cannot be written.
        _until(job, lambda: failed() > before, "no save has failed")
    newest = find(job.run)
    _until(job, lambda: find(job.run) != newest, "no checkpoint has followed")


@contextmanager
def _filled(path: Path) -> Iterator[None]:
    piece, filled = SIZE, 0
    with path.open("wb") as file:
        while piece >= 1 << 12:
            try:
                os.posix_fallocate(file.fileno(), filled, piece)
                filled += piece
            except OSError:
                piece //= 2
    try:
        yield
    finally:
        path.unlink()


def _slow(job: Training, _chance: random.Random) -> None:
    """Makes storage slow for a while."""
    job.switch.touch()
    until, last = time.monotonic() + SLOW_S, job.step + EVERY
    while time.monotonic() < until and job.step < last:
        job.poll()
    job.switch.unlink()


def all_faults(world: Path, small_disk: bool) -> list[Fault]:
    """A fault of each kind. `small_disk`: the run folder is on a disk that can be filled."""
    found = [
        Fault(
            f"{number.name}, {target}",
            partial(_send, number, target),
            early=target != "a loader worker" and number != signal.SIGSTOP,
        )
        for number in SIGNALS
        for target in TARGETS
    ]
    found += [
        Fault("damaged checkpoint", _damage, lost=2),
        Fault("truncated shard", partial(_truncate, world)),
        Fault("slow storage", _slow),
    ]
    return found + ([Fault(FULL, _fill)] if small_disk else [])


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts `folder` as a file system of its own, in memory; yields False where this user may
    not."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    try:
        mounted = os.geteuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)
