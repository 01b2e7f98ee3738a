"""Makes the parts of an import by the tasks of srun, or the ranks of torchrun.

Nothing but the shared folder is between them. A rank begins with the parts whose hash is its own,
goes on with those that nobody has, and keeps a file `OUT/parts/00003.claim` while it makes one,
into which it counts. Where that has stood still for a while its rank was killed, and another one
makes the part.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from data_pipeline.engines.job import Job, make_part
from data_pipeline.shards import ShardError

_BEAT = 2.0  # seconds between two counts of a claim, at most
_LOOK = 1.0  # seconds that a rank without work waits


class RunRank(NamedTuple):
    """A process of a run: which of how many, and the name of the run that all of them have."""

    rank: int
    size: int
    run: str


def run_rank(environment: Mapping[str, str] = os.environ) -> RunRank:
    """What torchrun or srun say in the environment; ShardError where neither has started this."""
    variable = environment.get
    try:
        if "RANK" in environment:
            run = f"torchrun {variable('TORCHELASTIC_RUN_ID', '')} {variable('MASTER_PORT', '')}"
            return RunRank(int(variable("RANK", "")), int(variable("WORLD_SIZE", "")), run)
        if "SLURM_PROCID" in environment:
            step = (
                variable(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
            )
            size = variable("SLURM_STEP_NUM_TASKS") or variable("SLURM_NTASKS", "1")
            return RunRank(int(variable("SLURM_PROCID", "")), int(size), f"srun {' '.join(step)}")
    except ValueError as error:
        raise ShardError(f"the environment of srun or torchrun cannot be read: {error}") from None
    raise ShardError(
        "--engine slurm: start it on all nodes with srun or torchrun: neither RANK nor "
        "SLURM_PROCID is set"
    )


def run_parts(job: Job, mine: RunRank, silence: float, done: Callable[[int], None]) -> None:
    """Makes parts until none is missing, calling `done` after each of its own.

    silence: seconds after which a rank that does not count is taken for killed. Raises ShardError
    where a part fails, and what `done` raises.
    """
    claims = _Claims(job.folder, silence)
    order = sorted(range(job.parts), key=lambda number: _place(number, mine))
    while left := set(job.missing()):
        part = next((n for n in order if n in left and claims.take(n)), None)
        if part is None:
            time.sleep(_LOOK)
            continue
        with claims.held(part):
            make_part(job, part)
        done(part)


def _place(number: int, mine: RunRank) -> tuple[bool, int]:
    """Where a part stands in this rank's order: its own parts first, then the others."""
    return _hash(number) % mine.size != mine.rank, _hash(number, mine.rank)


def _hash(*numbers: int) -> int:
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


@dataclass
class _Claims:
    """Who makes what. A claim that two ranks take costs time alone: the first part there counts."""

    folder: Path
    silence: float
    # Of each claim of others: what it said, and since when by this process's clock.
    _counters: dict[int, tuple[str, float]] = field(default_factory=dict)

    def take(self, number: int) -> bool:
        try:
            self._path(number).open("x").close()
            return True
        except FileExistsError:
            return self._stands_still(number)
        except FileNotFoundError:  # all parts are together already
            return False

    def _stands_still(self, number: int) -> bool:
        # Its content, not its time: clocks differ, and a network's file systems keep times.
        try:
            counter = self._path(number).read_text()
        except OSError:
            return False
        now = time.monotonic()
        before, since = self._counters.get(number, (None, now))
        if before != counter:
            self._counters[number] = (counter, now)
            return False
        return now - since > self.silence

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Keeps this rank's claim on a part while it is made: a thread counts into the claim's
        file."""
        ended = threading.Event()

        def count() -> None:
            beats = 0
            while True:
                with suppress(OSError):
                    self._path(number).write_text(f"{os.uname().nodename} {os.getpid()} {beats}")
                beats += 1
                if ended.wait(min(_BEAT, self.silence / 4)):
                    return

        counting = threading.Thread(target=count, daemon=True)
        counting.start()
        try:
            yield
        finally:
            ended.set()
            counting.join()
            self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.claim"
