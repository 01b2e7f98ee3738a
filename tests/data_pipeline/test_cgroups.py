"""Limits of cgroups, in files as the kernel's documentation has them (admin-guide/cgroup-v1 and
cgroup-v2)."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from data_pipeline import cgroups

GB = 1 << 30
ALL = len(os.sched_getaffinity(0))
SECOND = {"": "0::/\n", "job": "0::/job/step\n"}
FIRST = "12:memory:/job/step\n7:cpu,cpuacct:/job/step\n1:name=systemd:/\n0::/system\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        (SECOND[""], {"cpu.max": "100000 100000\n"}, 1),
        (SECOND[""], {"cpu.max": "50000 100000\n"}, 1),
        (SECOND[""], {"cpu.max": "max 100000\n"}, ALL),
        (SECOND[""], {"cpu.max": "99900000 100000\n"}, ALL),
        # A container: the mounted cgroup is its own, under another name.
        (SECOND["job"], {"cpu.max": "100000 100000\n"}, 1),
        # The smallest of those above, too.
        (SECOND["job"], {"job/cpu.max": "90000 100000\n", "job/step/cpu.max": "max 100000\n"}, 1),
        (FIRST, {"cpu/job/cpu.cfs_quota_us": "100000\n",
                 "cpu/job/cpu.cfs_period_us": "100000\n"}, 1),
        (FIRST, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, ALL),
        (FIRST, {}, ALL),
    ],
)  # fmt: skip
def test_cores_are_those_of_the_quota(tmp_path: Path, own, files, cores) -> None:
    write(tmp_path, {"own": own})
    assert cgroups.cores(write(tmp_path / "fs", files), tmp_path / "own") == cores


def test_parts_of_a_core_count_as_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    write(tmp_path, {"own": SECOND[""], "fs/cpu.max": "150000 100000\n"})
    assert cgroups.cores(tmp_path / "fs", tmp_path / "own") == 2


@pytest.mark.parametrize(
    ("own", "files"),
    [
        (SECOND["job"], {
            "job/memory.max": f"{GB}\n", "job/memory.current": f"{GB // 2}\n",
            "job/memory.stat": f"anon 5\ninactive_file {GB // 4}\n", "job/step/memory.max": "max\n",
        }),
        (FIRST, {
            "memory/job/step/memory.limit_in_bytes": f"{GB}\n",
            "memory/job/step/memory.usage_in_bytes": f"{GB // 2}\n",
            "memory/job/step/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB // 4}\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": f"{GB}\n",
        }),
    ],
)  # fmt: skip
def test_memory_is_that_of_the_limit(tmp_path: Path, own, files) -> None:
    write(tmp_path, {"own": own})
    where = write(tmp_path / "fs", files), tmp_path / "own"
    assert cgroups.memory(*where) == GB
    assert cgroups.free_memory(*where) == GB * 3 // 4


def test_without_limits_it_is_the_machine_s(tmp_path: Path) -> None:
    where = tmp_path, tmp_path / "no such file"
    assert cgroups.cores(*where) == ALL
    assert cgroups.memory(*where) == psutil.virtual_memory().total
