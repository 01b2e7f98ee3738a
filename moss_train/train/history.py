"""RUN/history.jsonl: each start and end of a job in a run folder, a line each; nothing is removed.

A job that was killed leaves no end.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moss_train.processes import age_s
from moss_train.train import json_lines
from moss_train.train.description import REPO, git_commit
from moss_train.train.metrics import read_metrics

HISTORY_FILE = "history.jsonl"


def note(run: Path, event: str, **what: Any) -> None:
    """Appends a line: `event`, `time` (seconds since 1970, UTC), and what else is given."""
    json_lines.append(run / HISTORY_FILE, {"event": event, "time": round(time.time(), 3), **what})


def read_history(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's history that are whole; [] where there is none."""
    return json_lines.read(run / HISTORY_FILE, "event", "time")


@dataclass(frozen=True)
class FoundRun:
    """What a job has found in its run folder: the checkpoint that it resumes from, checkpoints that
    are damaged, and a line for each field whose value has changed."""

    resumed_from: Path | None = None
    damaged: Sequence[Path] = ()
    changed: Sequence[str] = field(default_factory=list)


def all_hosts() -> dict[str, int]:
    """The job's machines, and the number of ranks on each. A collective."""
    everywhere = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, socket.gethostname())
    return dict(Counter(everywhere))


def note_start(
    run: Path, found: FoundRun, step: int, hosts: dict[str, int], layout: dict[str, int]
) -> None:
    """The entry of a job that goes on after `step`, before it removes later steps from the metrics:
    how many they are, and the seconds that they took, are lost; `last_sign`: of the job before."""
    rows = read_metrics(run)
    lost = [row for row in rows if row["step"] > step]
    signs = [entry["time"] for entry in read_history(run)]
    signs += [row["time"] for row in rows if "time" in row]
    started = time.time() - _own_age_s()
    note(
        run,
        "start",
        step=step,
        started=round(started, 3),
        last_sign=round(max(signs, default=started), 3),
        resumed_from=found.resumed_from and str(found.resumed_from),
        damaged=[str(path) for path in found.damaged],
        changed=list(found.changed),
        lost_steps=len(lost),
        lost_s=round(sum(row["step_time_s"] for row in lost), 3),
        hosts=hosts,
        layout=layout,
        git=git_commit(REPO),
        restart=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


@contextmanager
def noting_errors(run: Path) -> Iterator[None]:
    """An error that ends the job is an entry."""
    try:
        yield
    except BaseException as error:
        note(run, "error", error=f"{type(error).__name__}: {error}"[:1000])
        raise


def _own_age_s() -> float:
    """Seconds since this process was started (Linux), else since this was imported."""
    try:
        return age_s(os.getpid())
    except (OSError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()
