"""tools.preflight on real ranks: what is fit passes, what is not is named."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.toy.build import ToyConfig, build_toy
from tests.torchrun import Result, run_ranks
from tools.preflight.checks import WRITTEN, Findings, _storage
from tools.preflight.verdict import missing, table, wrong

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def preflight(tmp_path_factory):
    """preflight(how, ...): a run of two ranks."""
    world = tmp_path_factory.mktemp("world")
    build_toy(world, ToyConfig(train=4, heldout=1, stages=("pt2",)), workers=1)

    def run(how: str, *options: str) -> Result:
        out = tmp_path_factory.mktemp(how)
        job = ["stage=pt2", "model=tiny", "data=toy", f"data.root={world}", "hardware=cpu"]
        worker, overrides = "tests/workers/preflight.py", [*job, f"run.dir={out}/runs/new"]
        soon = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}  # then a stopped rank is killed
        return run_ranks(worker, 2, how, *options, *overrides, out=out, env=soon, check=False)

    return run


def test_ranks_that_are_fit_pass_and_nothing_is_left(preflight):
    result = preflight("well")
    assert result.returncode == 0, result.report()
    head, row = result.stdout().splitlines()[-2:]
    assert head.split()[:2] == ["machine", "ranks"]
    assert row.split()[:2] == [HOST, "2"]
    assert min(float(cell) for cell in row.split()[2:]) > 0
    assert {path.name for path in result.out.iterdir()} == {"logs", "torchrun.log"}


def test_a_rank_that_is_unfit_is_named(preflight):
    result = preflight("storage")
    assert result.returncode == 1
    assert f"error: {HOST}, rank 1: storage: OSError: [Errno 27]" in result.stderr()
    assert "rank 0:" not in result.stderr()

    result = preflight("other")
    assert result.returncode == 1
    assert f"error: {HOST}, rank 1: configuration " in result.stderr()


def test_a_rank_that_hangs_is_named(preflight):
    result = preflight("hang", "--limit", "15")
    assert result.returncode == 1
    assert f"error: {HOST}, rank 1: storage: no answer" in result.stderr()
    assert result.seconds < 15 + 120  # and a start and an end on a busy machine


def found(rank: int) -> Findings:
    speed = {"decoder MLP TFLOP/s": 600.0, "between GB/s": 40.0}
    same = {"torch": "2.13.0", "configuration": "ab"}
    return Findings(rank, f"node{rank}", rank, same=same, speed=speed, clocks=[1000.0, 1001.0])


def test_machines_that_differ_from_the_others_are_named():
    all_well = [found(rank) for rank in range(4)]
    assert list(wrong(all_well, accelerator=True)) == []
    assert [line.split() for line in table(all_well).splitlines()][1] == ["node0", "1", "600", "40"]
    old = replace(found(1), same={**found(1).same, "torch": "2.12.0"})
    slow = replace(found(2), speed={**found(2).speed, "between GB/s": 9.0})
    late = replace(
        found(3), clocks=[1003.5, 1005.0], wrong=["device: 9.0 GB of its memory are taken already"]
    )
    assert list(wrong([found(0), old, slow, late, found(4)], accelerator=True)) == [
        "node3, rank 3: device: 9.0 GB of its memory are taken already",
        "node1, rank 1: torch 2.12.0; others have 2.13.0",
        "node2, rank 2: 9 between GB/s; the median is 40",
        "node3, rank 3: clock: +3.5 s from the others",
    ]
    assert list(wrong([found(0), slow, found(4)], accelerator=False)) == []
    held_up = replace(found(1), clocks=[1009.0, 1001.0])  # it looked late, once
    assert list(wrong([found(0), held_up], accelerator=False)) == []
    at = {0: "6 node0: all-reduce", 2: "3 node2: storage", 3: "6 node3: all-reduce"}
    assert list(missing(at)) == ["node2, rank 2: storage: no answer"]


def test_what_storage_gives_back_is_read_from_storage(tmp_path):
    """What has just been written is in memory: that would be read, whatever the disk has."""

    def fetched() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["read_bytes"])

    if (kind := _file_system(tmp_path)) not in ("btrfs", "ext4", "overlay", "xfs"):
        pytest.skip(f"of {kind} the system may not count what is read")  # of tmpfs there is nothing
    before, rank = fetched(), found(0)
    _storage(tmp_path, rank)
    assert rank.wrong == []
    assert fetched() - before >= WRITTEN[False]
    assert rank.speed["read MB/s"] > 0
    assert list(tmp_path.iterdir()) == []


def _file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(len(place), kind) for place, kind in mounts if folder.is_relative_to(place)]
    return max(above)[1]
