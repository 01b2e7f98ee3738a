"""The job script against a stand-in for Slurm, which starts the real processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.moss_train.train.runs import is_running, losses, saved_steps, steps, wait_for
from tests.torchrun import REPO

STEPS = 14
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def submit(small, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Runs the job script, again and again, in one run folder."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[1]",
        "GPUS_PER_NODE": "2", "HARDWARE": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    job = [*(o for o in small if o != "hardware=cpu"), "parallel=tp2", f"trainer.steps={STEPS}"]
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        with (tmp_path / f"log{len(started)}").open("w") as log:
            started.append(
                subprocess.Popen(
                    ["bash", "launch/slurm/train.sbatch", *job, f"run.dir={tmp_path}/run"],
                    cwd=REPO, env={**os.environ, **slurm}, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started."""
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def step_done(run: Path, step: int) -> bool:
    return max(steps(run, whole=False), default=0) >= step


def test_a_stopped_job_is_queued_again_until_it_is_done(submit, tmp_path):
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    job = submit()
    wait_for(lambda: step_done(run, 2))
    (launcher,) = children(job.pid)  # srun has become it
    for pid in (
        *children(launcher),
        launcher,
    ):  # as --signal=TERM@300 does: each process of the step
        os.kill(pid, signal.SIGTERM)
    assert job.wait(240) == 130, (tmp_path / "log0").read_text()[-2000:]
    assert requeued.read_text() == "requeue 17\n"
    first = saved_steps(run)[-1]
    assert first == steps(run)[-1] < STEPS

    job = submit()
    wait_for(lambda: step_done(run, first + 1))
    (launcher,) = children(job.pid)
    ranks = children(launcher)
    os.kill(launcher, signal.SIGKILL)
    assert job.wait(240) == 137
    wait_for(lambda: not any(is_running(pid) for pid in ranks))
    second = saved_steps(run)[-1]
    assert first < second == steps(run)[-1] < STEPS

    assert submit().wait(240) == 0, (tmp_path / "log2").read_text()[-2000:]
    assert requeued.read_text() == "requeue 17\n"
    assert steps(run) == list(range(1, STEPS + 1))
    assert saved_steps(run)[-1] == STEPS
    assert len(set(losses(run))) == STEPS
