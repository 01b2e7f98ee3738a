"""Which rank of how many this process is, as torchrun says in its environment; and what a rank that
waits for others says meanwhile. Nothing of torch is imported here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

PATIENCE_S = 1.0  # how long ranks wait for each other without a word
# How many tasks a launcher that is not torchrun has started.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class RanksError(ValueError):
    """The environment describes no job that can start."""


class JoinError(RuntimeError):
    """The ranks of a job do not come together."""


@dataclass(frozen=True)
class Ranks:
    """This process in its job. `address`: HOST:PORT where the ranks meet, "" for a job of one."""

    rank: int = 0
    size: int = 1
    address: str = ""


def ranks_of(environment: Mapping[str, str] = os.environ) -> Ranks:
    """What RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say; without them a job of one.

    Raises:
        RanksError: they do not fit together; in one line, with what to do.
    """
    variables = {name: environment.get(name, "").strip() for name in ("RANK", "WORLD_SIZE")}
    for name, text in variables.items():
        if text and not text.isdecimal():
            raise RanksError(f"{name}={text}: must be a whole number: start with torchrun")
    rank, size = (int(text) if text else None for text in variables.values())
    if rank is None:
        if size not in (None, 1):
            raise RanksError(
                f"WORLD_SIZE={size}, but RANK is not set: start with torchrun "
                f"(--nproc-per-node {size}), or unset WORLD_SIZE for a job of one process"
            )
        for name in TASKS:
            if environment.get(name, "1") not in ("0", "1"):
                raise RanksError(
                    f"{name}={environment[name]}, but RANK is not set: each task would be a job of "
                    "its own: start one torchrun on each node"
                )
        return Ranks()
    if size is None or rank >= size:
        found = "is not set" if size is None else f"is {size}"
        raise RanksError(
            f"RANK={rank}, but WORLD_SIZE {found}: start with torchrun, or unset RANK for a job of "
            "one process"
        )
    if size == 1:
        return Ranks()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise RanksError(
            f"RANK={rank} of WORLD_SIZE={size}, but {' and '.join(missing)} not set: start with "
            "torchrun, or name the host and a free port of rank 0"
        )
    return Ranks(rank, size, f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}")


def local_rank() -> int:
    """Which of this machine's processes of the job this is (LOCAL_RANK); 0 in a job of one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_of_machine() -> int:
    """How many processes of the job this machine has (LOCAL_WORLD_SIZE)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joining(ranks: Ranks, say: Callable[[str], None]) -> Iterator[None]:
    """Says what this rank waits for, if it has not met the others after a second. Under torchrun
    rank 0 alone speaks: torchrun has started all the others.

    Under torchrun rank 0 alone speaks: torchrun has started all the others.

    Raises:
        JoinError: they did not come together; in one line, with what to do.
    """
    where = f"{ranks.size} ranks at {ranks.address}"
    speaks = ranks.rank == 0 or "TORCHELASTIC_RUN_ID" not in os.environ
    timer = threading.Timer(PATIENCE_S, say, [f"rank {ranks.rank} waits for {where}"])
    timer.daemon = True
    if speaks and ranks.size > 1:
        timer.start()
    try:
        yield
    except RuntimeError as error:  # torch's errors of its store are
        raise _explained(error, ranks, where) from None
    finally:
        timer.cancel()


def _explained(error: RuntimeError, ranks: Ranks, where: str) -> Exception:
    line = " ".join(str(error).split())
    if "EADDRINUSE" in line:
        port = ranks.address.rpartition(":")[2]
        return JoinError(
            f"MASTER_PORT={port}: another process listens there (another job, or a second rank 0): "
            "choose a free port; torchrun --standalone finds one"
        )
    vain = ("imed out", "wait timeout", "annot be retrieved", "failed to connect")
    if any(words in line for words in vain):
        return JoinError(
            f"rank {ranks.rank} waited in vain for {where}: start all ranks within the time-out, "
            f"with the same MASTER_ADDR and MASTER_PORT ({line.partition('Exception raised')[0]})"
        )
    return error
