"""The job scripts against a stand-in for Slurm, which starts the real processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.moss_train.train.runs import ENDLESS, is_running, losses, saved_steps, steps
from tests.torchrun import REPO, free_port
from tests.waiting import until

# Two nodes: the command twice. As srun, it gives its children a signal that it gets, and ends with
# the worst of their codes.
SRUN = """#!/bin/bash
echo "$@" >> "$SAID"
while [[ "$1" == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
trap 'kill -TERM $first $second' TERM
worst=0
for node in $first $second; do
  wait $node; code=$?
  while kill -0 $node 2> /dev/null; do wait $node; code=$?; done
  [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
SLURM = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$(basename "$0") $*" >> "$SAID"; fi
"""
# Of nvidia-resiliency-ext, which has no wheel for every system: torchrun with more options.
FT_LAUNCHER = """
from torch.distributed import run

def main(arguments):
    own = [word for word in arguments if word.startswith("--ft-")]
    assert own == ["--ft-rank-heartbeat-timeout=600"], own
    run.main([word for word in arguments if word not in own])
    raise SystemExit(0)
"""


@pytest.fixture
def submit(small, tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Runs a job script, again and again, in one run folder."""
    for name, text in (("srun", SRUN), ("scontrol", SLURM), ("scancel", SLURM)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    package = tmp_path / "nvidia_resiliency_ext" / "fault_tolerance"
    package.mkdir(parents=True)
    (package / "launcher.py").write_text(FT_LAUNCHER)
    slurm = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path), "SAID": str(tmp_path / "said"), "PORT": str(free_port()),
        "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2", "SLURM_ARRAY_JOB_ID": "16", "GPUS_PER_NODE": "1", "HARDWARE": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    job = [*(o for o in small if o not in ("hardware=cpu", "model=toy")), "model=tiny"]
    job += ["model.text.vocab_size=512", "parallel=dp2"]
    started: list[subprocess.Popen] = []

    def start(script: str, steps: int, **more: str) -> subprocess.Popen:
        with (tmp_path / f"log{len(started)}").open("w") as log:
            started.append(
                subprocess.Popen(
                    ["bash", f"launch/slurm/{script}", *job, f"trainer.steps={steps}",
                     f"run.dir={tmp_path}/run"],
                    cwd=REPO, env={**os.environ, **slurm, **more}, stdout=log, stderr=log,
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


def test_a_stopped_job_is_queued_again_and_the_last_of_a_chain_removes_the_rest(submit, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    container = {"CONTAINER": "moss.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    job = submit("train.sbatch", ENDLESS, **container)
    until(lambda: max(steps(run, whole=False), default=0) >= 2)
    (srun,) = children(job.pid)
    launchers = children(srun)
    processes = [*launchers, *(rank for launcher in launchers for rank in children(launcher))]
    for pid in processes:  # as --signal=TERM@300 does: each process of the step
        os.kill(pid, signal.SIGTERM)
    assert job.wait(480) == 130, (tmp_path / "log0").read_text()[-2000:]
    checked, trained, queued = said.read_text().splitlines()
    inside = f"--container-image=moss.sqsh --container-workdir={REPO} --container-mounts={REPO}"
    for line in (checked, trained):
        assert line.startswith(f"--kill-on-bad-exit=1 {inside}:{REPO},/data:/data python launch/")
    assert "-m tools.preflight hardware=cpu stage=pt2" in checked
    assert queued == "scontrol requeue 17"
    assert not any(is_running(pid) for pid in processes)
    first = saved_steps(run)[-1]
    assert first == steps(run)[-1]

    options = "--ft-rank-heartbeat-timeout=600"
    last = first + 3
    job = submit("chain.sbatch", last, PREFLIGHT="0", FT="1", FT_OPTIONS=options)
    assert job.wait(480) == 0, (tmp_path / "log1").read_text()[-2000:]
    trained, removed = said.read_text().splitlines()[3:]
    assert trained.startswith(f"--kill-on-bad-exit=1 python launch/torchrun.py --ft {options} ")
    assert removed == "scancel --state=PENDING 16"
    assert steps(run) == list(range(1, last + 1))
    assert saved_steps(run)[-1] == last
    assert len(set(losses(run))) == last
