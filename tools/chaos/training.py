"""Runs the job that faults happen to: two replicas of two tensor ranks train the smallest model on
the toy world; when the job has ended, it is started again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.toy.build import ToyConfig, build_toy
from moss_train.processes import stat_fields
from moss_train.train.history import HISTORY_FILE
from moss_train.train.json_lines import read
from moss_train.train.metrics import METRICS_FILE
from tools.preloaded import REPO, Command, python_path, torchrun

RANKS, EVERY = 4, 3  # processes; steps between checkpoints, and between validations
HANG_S, HANG_IO_S = 10, 40  # the job's own limits: within a step; where it waits for storage
RESTARTS = 3  # of the ranks, by torchrun, in one start of the job
POLL = 0.05  # seconds
_TAIL = 1 << 14  # bytes: more than a line of metrics.jsonl
_BLOCKED = 1 << (signal.SIGTERM - 1)


def make_world(folder: Path) -> Path:
    """Builds a toy world with a shard of training data cut off: the loader replaces what it cannot
    read by the same samples, however often the job is interrupted."""
    world = folder / "world"
    build_toy(world, ToyConfig(train=24, heldout=1, samples_per_shard=8, stages=("pt2",)))
    shard = max((world / "pt2" / "train" / "image").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    return world


def options(world: Path, steps: int) -> list[str]:
    """Overrides of the job, without its run folder."""
    return [
        "stage=pt2", "model=tiny", "model.text.vocab_size=512", "data=toy", f"data.root='{world}'",
        "parallel=tp2", "hardware=cpu", "hardware.threads=1", f"hardware.hang_s={HANG_S}",
        f"hardware.hang_io_s={HANG_IO_S}",
        "stage.mixture={text: 40, image: 40, video: 20}", "stage.video_max_frames=4",
        "data.global_batch=4", "data.workers=1", "data.max_bad_ratio=0.9", "data.audit=true",
        f"trainer.steps={steps}", f"trainer.checkpoint_every={EVERY}",
        f"trainer.eval_every={EVERY}",
    ]  # fmt: skip


def in_peace(steps: int) -> list[str]:
    """Further overrides of the run without faults: it does nothing but steps."""
    return [f"trainer.checkpoint_every={steps}", "trainer.eval_every=null"]


def children(pid: int) -> list[int]:
    """The running processes that a process has started, in all of its threads."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, listed.read_text().split())
    return [child for child in found if runs(child)]


def runs(pid: int) -> bool:
    """Whether a process runs; False for one that has ended and is still listed (a zombie), too."""
    with suppress(OSError):
        return stat_fields(pid)[0] not in "ZX"
    return False


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    """Sends a signal to processes, some of which may have gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@dataclass
class Training:
    """A job, seen from outside."""

    folder: Path
    run: Path  # the run folder
    overrides: list[str]
    ends: list[int] = field(default_factory=list)  # exit codes of its starts so far
    launchers: list[int] = field(default_factory=list)  # of all starts; each leads a session
    step: int = 0  # the last one that was ever done
    stall_s: float = 0.0  # longest time without a new step, since `fresh` was called
    _command: Command | None = None
    _since: float = field(default_factory=time.monotonic)

    @property
    def switch(self) -> Path:
        """The file that makes storage slow while it exists."""
        return self.folder / "slow"

    @property
    def temporary(self) -> Path:
        """The folder in which the run's processes make temporary files."""
        return self.folder / "tmp"

    @property
    def log(self) -> Path:
        """The log of the start that runs now."""
        return self.folder / f"{self.run.name}_{len(self.ends):03d}.log"

    @property
    def launcher(self) -> int:
        """The process of torchrun."""
        return self.launchers[-1]

    @property
    def done(self) -> bool:
        """Whether the job has done all of its steps."""
        return self.ends[-1:] == [0]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the job inside the context; kills all of its processes at the end."""
        self.temporary.mkdir(exist_ok=True)
        try:
            self._start()
            yield
        finally:
            kill(self.left())

    def _start(self) -> None:
        """Starts the job, as forks of a process that has imported what it needs."""
        how = ["--nproc-per-node", str(RANKS), "--max-restarts", str(RESTARTS)]
        how += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        rank = [str(self.switch), str(self.folder), *self.overrides, f"run.dir='{self.run}'"]
        arguments = torchrun(how, REPO / "tools" / "chaos" / "rank.py", rank)
        own = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        own["TMPDIR"] = str(self.temporary)
        self._command = Command("launch.torchrun", arguments, {**os.environ, **own}, self.log)
        self.launchers.append(self._command.pid)

    def poll(self) -> None:
        """Looks how far the job has come; starts it again where it has ended."""
        time.sleep(POLL)
        now, step = time.monotonic(), self._last_step()
        self.stall_s = max(self.stall_s, now - self._since)
        if step > self.step:
            self.step, self._since = step, now
        assert self._command is not None
        code = None if self.done else self._command.poll()
        if code is not None:
            self.ends.append(code)
            if not self.done:
                self._start()

    def wait(self, step: int, limit_s: float) -> bool:
        """Waits until a step is done, or the job has ended; False where no step was done for
        `limit_s`."""
        while self.step < step and not self.done:
            self.poll()
            if time.monotonic() - self._since > limit_s:
                return False
        return True

    def stop(self, limit_s: float) -> int | None:
        """Asks the job to end; returns its exit code, or None where it has not ended in time."""
        assert self._command is not None
        kill([self.launcher], signal.SIGTERM)
        until = time.monotonic() + limit_s
        while (code := self._command.poll()) is None and time.monotonic() < until:
            time.sleep(POLL)
        self.step = self._last_step()
        return code

    def fresh(self) -> None:
        """Begins to measure stalls anew."""
        self.stall_s, self._since = 0.0, time.monotonic()

    def ranks(self) -> list[int]:
        """The ranks' processes; none while torchrun starts."""
        return children(self.launcher)

    def workers(self) -> list[int]:
        """The loaders' processes: those started by ranks that block SIGTERM."""
        return [pid for rank in self.ranks() for pid in children(rank) if _blocks_term(pid)]

    def left(self) -> list[int]:
        """All processes of the job, of any of its starts, that still run."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                fields = stat_fields(int(path.name))  # the state first, fourth the session
                if int(fields[3]) in self.launchers and fields[0] not in "ZX":
                    found.append(int(path.name))
        return found

    def files_left(self) -> list[Path]:
        """Files that a job must not leave in its run folder, in memory or in its temporary
        folder."""
        patterns = ("checkpoints/.writing_*", "checkpoints/.removing_*", "**/*.partial", "running")
        found = [path for pattern in patterns for path in self.run.glob(pattern)]
        for launcher in self.launchers:
            found += Path("/dev/shm").glob(f"moss-train-ranks-{os.getuid()}-{launcher}-*")
        # torch's own, of ranks that are forks of torchrun: only here and in tests.
        forks = "pytorch-errorfile-"
        found += (p for p in self.temporary.iterdir() if not p.name.startswith(forks))
        return found

    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, from its history."""
        return [e for e in read(self.run / HISTORY_FILE, "event") if e["event"] == "start"]

    def _last_step(self) -> int:
        path = self.run / METRICS_FILE
        with suppress(OSError), path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            for line in reversed(file.read().splitlines(keepends=True)):
                with suppress(ValueError, KeyError, TypeError):
                    return int(json.loads(line)["step"])
        return 0


def _blocks_term(pid: int) -> bool:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigBlk:"):
                return bool(int(line.split()[1], 16) & _BLOCKED)
    return False
