"""How many cores and how much memory this process may use: a container or a batch system often
gives it less than the machine has, by limits of its cgroups (version 1 or 2), of which no other
call knows."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_LIMITS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores(limits: Path = _LIMITS, own: Path = _OWN) -> int:
    """How many cores this process may keep busy: its own ones, or what its quota of their time
    makes, rounded up (`docker --cpus 1.5`: 2).

    Args:
        limits: where the system shows its cgroups. own: the file that names this process's.
    """
    on_linux = sys.platform == "linux"
    count = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    for folder in _folders("cpu", limits, own):
        quota = _numbers(folder / "cpu.max") or [  # `150000 100000`: microseconds of so many
            *_numbers(folder / "cpu.cfs_quota_us"),
            *_numbers(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and min(quota) > 0:  # -1: no quota
            count = min(count, math.ceil(quota[0] / quota[1]))
    return max(1, count)


def memory(limits: Path = _LIMITS, own: Path = _OWN) -> int:
    """Bytes of memory that this process and its neighbours in its cgroup may have in all."""
    most = psutil.virtual_memory().total
    return min([most, *(limit for _, limit in _memory_limits(limits, own))])


def free_memory(limits: Path = _LIMITS, own: Path = _OWN) -> int:
    """Bytes of memory that are free for this process; what files are cached in counts as free."""
    free = psutil.virtual_memory().available
    for folder, limit in _memory_limits(limits, own):
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes")
        if used:
            free = min(free, limit - used[0] + _cached(folder))
    return max(0, free)


def _memory_limits(limits: Path, own: Path) -> Iterator[tuple[Path, int]]:
    for folder in _folders("memory", limits, own):
        limit = _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        if limit:
            yield folder, limit[0]


def _cached(folder: Path) -> int:
    """Bytes of files that the system keeps for a cgroup as long as nobody needs the room."""
    try:
        lines = (folder / "memory.stat").read_text().split("\n")
    except OSError:
        return 0
    found = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def _folders(controller: str, limits: Path, own: Path) -> Iterator[Path]:
    """The folder of this process's cgroup for a controller, and those of all above it, each of
    which has a limit of its own. In a container the mounted one is often the process's, whatever
    `own` says."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = limits / controller if controllers else limits
        inner = top / path.strip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))


def _numbers(file: Path) -> list[int]:
    """The numbers in a file of a cgroup; none: it is not there, or says `max`."""
    try:
        return [int(word) for word in file.read_text().split()]
    except (OSError, ValueError):
        return []
