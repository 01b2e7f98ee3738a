"""Imports in parts: the same shards from every engine; a kill costs the part being made."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.build import BuildOptions, build_shards
from data_pipeline.build import main as import_whole
from data_pipeline.engines import local
from data_pipeline.engines.job import Job
from data_pipeline.engines.local import run_local
from data_pipeline.engines.ranks import run_rank
from data_pipeline.importers import pool
from data_pipeline.shards import ShardError
from tests.data_pipeline.importers.jobs import blocked, contents, has_ended, make_records
from tests.samples import imported
from tests.torchrun import REPO
from tests.waiting import PATIENCE, until
from tools.shards.__main__ import main

RECORDS, PARTS, STOP = 700, 5, 400  # STOP: the record whose picture is its own
OPTIONS = ("--parts", str(PARTS), "--samples-per-shard", "50", "--workers", "2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(tmp_path_factory.mktemp("source") / "in", RECORDS)


@pytest.fixture(scope="module")
def whole(source: Path) -> dict[str, str]:
    """What an undisturbed build leaves."""
    out = source.parent.parent / "whole"
    assert build(source, out, "--workers", "1") == 0
    return contents(out)


def build(source: Path, out: Path, *options: str) -> int:
    return main(["build", str(source), str(out), *OPTIONS, *options])


def start(source: Path, out: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tools.shards", "build", str(source), str(out), *OPTIONS]
    return subprocess.Popen(
        [*command, *options], cwd=REPO, env={**os.environ, **environment}, start_new_session=True
    )


def attempts(out: Path) -> dict[int, str]:
    """The processes that make parts, or were killed as they did, with the part."""
    found = (re.fullmatch(r"\.(\d+)\..*-(\d+)-\w+", p.name) for p in (out / "parts").glob(".*"))
    return {int(match[2]): match[1] for match in found if match}


def stuck(out: Path, killed: set[int]) -> int:
    """The process that makes the one part that is left, once all others are there."""
    pids: list[int] = []

    def alone() -> bool:
        there = [path for path in (out / "parts").glob("[0-9]*") if path.is_dir()]
        pids[:] = [pid for pid in attempts(out) if pid not in killed]
        return len(there) == PARTS - 1 and len(pids) == 1

    until(alone)
    return pids[0]


def test_parts_hold_what_an_import_holds(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert import_whole([str(source), str(tmp_path / "whole"), "--workers", "0"]) == 0
    assert build(source, out) == 0
    assert imported(out) == imported(tmp_path / "whole")
    assert len(imported(out)) == 653
    assert {path.name for path in out.iterdir()} >= {"image", "text", "rejected.jsonl"}
    assert not list(out.glob("*parts"))


def test_a_killed_worker_costs_its_part(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with blocked(source.parent / f"own{STOP}.png"):
        job = start(source, out)
        worker = stuck(out, set())
        made = {path: path.stat().st_ino for path in (out / "parts").glob("[0-9]*")}
        os.kill(worker, signal.SIGKILL)
        again = stuck(out, {worker})
        assert attempts(out)[again] == attempts(out)[worker]
        assert made == {path: path.stat().st_ino for path in (out / "parts").glob("[0-9]*")}
        os.killpg(job.pid, signal.SIGKILL)  # now all of it
        job.wait()
        until(lambda: has_ended(job.pid))
    assert build(source, out) == 1, "without --resume"
    assert build(source, out, "--resume") == 0
    assert contents(out) == whole
    assert build(source, out, "--resume") == 0, "finished already"
    assert build(source, out, "--resume", "--max-side", "99") == 1, "other arguments"


def test_ranks_of_srun_do_a_killed_ones_part(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ranks = [
        {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "3", "SLURM_JOB_ID": "7"} for rank in range(3)
    ]
    # A rank that the machine does not let run for some seconds is not silent: its part would be
    # made by two, that wait at the same picture.
    engine = ("--engine", "slurm", "--silence", "8")
    with contextlib.ExitStack() as last:
        with blocked(source.parent / f"own{STOP}.png"):
            jobs = [start(source, out, *engine, **rank) for rank in ranks]
            for job in jobs:
                last.callback(job.kill)
            first = stuck(out, set())
            os.kill(first, signal.SIGKILL)
            second = stuck(out, {first})
            assert {first, second} < {job.pid for job in jobs}
            assert attempts(out)[first] == attempts(out)[second]
            os.kill(second, signal.SIGKILL)
        assert sorted(job.wait(PATIENCE) for job in jobs) == [-9, -9, 0]
    assert contents(out) == whole


def test_a_rank_is_what_srun_or_torchrun_say() -> None:
    srun = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "8"}
    assert run_rank(srun)[:2] == (2, 6)
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
    assert run_rank(srun | torchrun)[:2] == (1, 4), "torchrun inside a job of Slurm"
    assert run_rank(srun | torchrun) != run_rank(torchrun | {"TORCHELASTIC_RUN_ID": "y"})
    with pytest.raises(ShardError, match="with srun or torchrun"):
        run_rank({})
    with pytest.raises(ShardError, match="cannot be read"):
        run_rank({"RANK": "one"})


def test_what_is_wrong_is_said_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(source, tmp_path / "a", "--max-rejected", "5") == 1
    assert "records rejected (missing_file" in capsys.readouterr().err
    assert build(source.parent / "gone.jsonl", tmp_path / "c") == 1
    assert "gone.jsonl does not exist" in capsys.readouterr().err


def test_an_error_of_any_length_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe holds less of it: the part's process waits until it is read."""
    words = "x" * 2**20

    def failing(*_: object) -> None:
        raise ShardError(words)

    monkeypatch.setattr(local, "make_part", failing)
    job = Job(str(source), str(tmp_path), BuildOptions(), 1)
    job.folder.mkdir()
    with pytest.raises(ShardError, match=f"^part 0: {words}$"):
        run_local(job, workers=1, retries=0, done=lambda number: None)


def test_a_fault_of_ours_is_not_said_to_be_a_kill(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise KeyError("frames")

    monkeypatch.setattr(local, "make_part", failing)
    job = Job(str(source), str(tmp_path), BuildOptions(), 1)
    job.folder.mkdir()
    with pytest.raises(ShardError, match=r"^part 0: KeyError: 'frames'$"):
        run_local(job, workers=1, retries=0, done=lambda number: None)
    assert "in failing" in capfd.readouterr().err
    monkeypatch.setattr(pool, "finish", failing)
    with pytest.raises(ShardError, match=r"KeyError: 'frames'$"):
        build_shards(source, tmp_path / "out", BuildOptions(workers=1))
    assert "in failing" in capfd.readouterr().err
