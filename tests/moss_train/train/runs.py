"""Jobs without torchrun, and what the tests of jobs read of a run folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from moss_train.train.metrics import MetricsWriter, StepMetrics
from tests.torchrun import OUT, REPO
from tests.waiting import PATIENCE
from tools.preloaded import Command

ENTRY = "launch/train.py"
ENDLESS = 10_000  # steps: whenever the job is stopped, it has not ended


class Process:
    """`python launch/train.py` without torchrun, leader of a process group as in a terminal.

    preloaded: the same command as a fork (see tools/preloaded.py).
    """

    def __init__(self, overrides: list[str], folder: Path, preloaded: bool = False):
        self.log = folder / "log"
        self.process: subprocess.Popen | Command
        if preloaded:
            self.process = Command("launch.train", overrides, log=self.log, folder=REPO)
            return
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ENTRY, *overrides],
                cwd=REPO,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def metrics(run: Path, whole: bool = True) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. `whole`: every one must be; else the last may be cut off."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if not whole and lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def write_metrics(folder: Path, losses: list[float]) -> None:
    """A real metrics.jsonl of steps with these losses, each of half a second."""
    writer = MetricsWriter(folder)
    for step, loss in enumerate(losses, start=1):
        writer.write(
            StepMetrics(
                step=step, loss=loss, lr=2e-5 * min(1.0, step / 20), grad_norm=1.0,
                samples=8, tokens=500, labels=100, frames=16, turns=10, masked_turns=0,
                truncated_samples=0, truncated_labels=0, step_time_s=0.5,
                model_tflops_per_s_per_rank=0.1, memory_gb=1.0, data_wait_s=0.0,
                skipped_samples=step % 2, skipped_reasons={"bad_json": 1} if step % 2 else {},
                skipped_steps=0, frames_per_rank_max=8,
                frames_per_rank_mean=8.0, padding_ratio=0.2,
                epochs={"toy": 0.25 * step},
            )
        )  # fmt: skip


def steps(run: Path, whole: bool = True) -> list[int]:
    """The numbers of the steps in metrics.jsonl."""
    return [row["step"] for row in metrics(run, whole)]


def losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [row["loss"] for row in metrics(run)]


def audit(run: Path) -> dict[int, list[str]]:
    """The sample keys of each step, all replicas together."""
    keys: dict[int, list[str]] = {}
    for path in sorted(run.glob("audit.*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            keys.setdefault(row["step"], []).extend(row["keys"])
    return {step: sorted(found) for step, found in sorted(keys.items())}


def saved_steps(run: Path) -> list[int]:
    """The steps whose checkpoints have a finished one's name."""
    return sorted(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))


def end_orphans(folder: Path) -> None:
    """Ends what a killed rank leaves of runs in `folder`: megatron's checkpoint writer has a
    manager process, which outlives it.
    """
    mark = f"{OUT}={folder}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(
                entry.startswith(mark) for entry in (process / "environ").read_bytes().split(b"\0")
            ):
                os.kill(int(process.name), signal.SIGKILL)


def flip_a_bit(path: Path) -> None:
    """One in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def is_running(pid: int) -> bool:
    """True for a process that is neither gone nor only waits to be reaped."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
