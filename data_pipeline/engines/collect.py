"""Puts finished parts together: shards and rejected records of all, index, result.

It may be killed and called again at any point, and by several processes at once: one does the work.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.atomic import unlock
from data_pipeline.build import index_groups
from data_pipeline.engines.job import Job, check_parts, read_result, write_result
from data_pipeline.importers.journal import REJECTED, SHARDS, Summary, read_lines, write_lines
from data_pipeline.shards import ShardError


def collect(job: Job, workers: int) -> Summary:
    """The counts of the whole import; `workers` processes index its shards.

    Raises TooManyRejectedError, ShardError where a shard of a part is gone.
    """
    out = Path(job.out)
    with _alone(out):
        summary = read_result(job)
        if summary is None:
            summary = check_parts(job, last=True)
            for number in range(job.parts):
                _publish(job.part(number), out)
            index_groups(out, summary.imported, workers)
            for name in (SHARDS, REJECTED):
                write_lines(out / name, _lines(job, name))
            write_result(job, summary)
        _remove(job.folder)
    return summary


def _lines(job: Job, name: str) -> list[dict[str, Any]]:
    """The lines of a file of all parts, with the number of the part."""
    return [
        line | {"part": number}
        for number in range(job.parts)
        for line in read_lines(job.part(number) / name)
    ]


def _publish(part: Path, out: Path) -> None:
    """Moves the shards of a part to where they belong, but those that are there already."""
    for line in read_lines(part / SHARDS):
        shard, place = part / line["group"] / line["shard"], out / line["group"] / line["shard"]
        if shard.exists():
            place.parent.mkdir(exist_ok=True)
            shard.rename(place)
        elif not place.exists():
            raise ShardError(f"{shard} is gone: remove {part} and give the command again")


def _remove(parts: Path) -> None:
    """All at once: with some of its parts gone a process that looks would make these again."""
    leaving = parts.with_name(f".{parts.name}")
    if parts.exists():
        shutil.rmtree(leaving, ignore_errors=True)
        parts.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            unlock(lock)
