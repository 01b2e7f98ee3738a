"""Starts real multi-process runs for tests, with torchrun over gloo, and reports how they went.

torchrun and its ranks are forks of a process that has imported torch and megatron (see
tools/preloaded.py) unless a test is about how a job starts or ends: `preloaded=False`.

In a test:

    result = run_ranks("tests/workers/golden.py", 2, "tp2", out=tmp_path)
    loss = result.load("loss", rank=1)

In the worker, `save_result("loss", value)` writes what the test loads: tensors and the like as .pt,
plain values (`as_json=True`) as .json. Workers need `if __name__ == "__main__"`.

What keeps such tests quick:
- One start of ranks does all that a file asks of them, in a module's fixture. A start of forks
  takes half a second of a core; by the command a rank takes four, most of them for imports.
- A worker ends the groups of a layout before the next one (workers/groups.py).
- Hundreds of tensors travel, and are saved, as views of one (`_merge` in workers/matrix.py).
- Files that take longer than ten seconds stand in LONG (conftest.py), the longest first.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.preloaded import Command, python_path, torchrun

REPO = Path(__file__).resolve().parent.parent
OUT = "MOSS_TEST_OUT"  # environment variable: where workers put their results
# When a rank has died, the others end by themselves: torchrun, which waits for them before it kills
# them, would wait longer than the test does.
UNKILLED = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1000"}
_TAIL = 60  # lines of a rank's output that an error shows
# The first port of tests, below those that systems give by themselves; ports of a worker.
_PORTS, _PORTS_EACH = 20_000, 250
_tried = itertools.count(os.getpid())  # another run of tests begins elsewhere


class RanksFailedError(AssertionError):
    """A run failed or took too long. The message starts with the failing rank's traceback."""


@dataclass
class Result:
    """A finished run: its exit code, its results in `out`, and what each rank printed."""

    returncode: int
    out: Path
    seconds: float

    def load(self, name: str = "result", rank: int = 0) -> Any:
        """What `rank` gave to `save_result(name, ...)`."""
        for path in self._files(name, rank):
            if path.suffix == ".json":
                return json.loads(path.read_text())
            return torch.load(path, weights_only=False)
        raise RanksFailedError(f"rank {rank} saved no {name}\n{self.report()}")

    def load_all(self, name: str = "result") -> list[Any]:
        """What every rank that saved `name` saved, in order of rank."""
        found = {int(p.stem.rsplit(".rank", 1)[1]) for p in self.out.glob(f"{name}.rank*")}
        return [self.load(name, rank) for rank in sorted(found)]

    def stdout(self, rank: int = 0) -> str:
        """What `rank` printed."""
        return self._log(rank, "stdout")

    def stderr(self, rank: int = 0) -> str:
        """What `rank` printed to stderr: its traceback, if it has one."""
        return self._log(rank, "stderr")

    def launcher(self) -> str:
        """What torchrun itself printed."""
        return _text(self.out / "torchrun.log")

    def failed_rank(self) -> int | None:
        """The rank that failed first, as torchrun saw it."""
        root = self.launcher().partition("Root Cause")[2]
        found = re.search(r"rank\s*:\s*(\d+)", root)
        return int(found[1]) if found else None

    def report(self) -> str:
        """Tracebacks: the failing rank's first, then the others', then the launcher's words."""
        ranks = sorted(int(path.name) for path in self._rank_folders())
        first = self.failed_rank()
        ranks.sort(key=lambda rank: (rank != first, "Traceback" not in self.stderr(rank), rank))
        parts = []
        for rank in ranks:
            text = _tail(self.stderr(rank)) or "(nothing on stderr)"
            parts.append(f"--- rank {rank}{' failed first' if rank == first else ''}\n{text}")
        return "\n".join([*parts, f"--- torchrun\n{_tail(self.launcher())}"])

    def _files(self, name: str, rank: int) -> list[Path]:
        return [p for p in self.out.glob(f"{name}.rank{rank}.*") if p.suffix in (".pt", ".json")]

    def _rank_folders(self) -> list[Path]:
        return [p for p in self.out.glob("logs/*/attempt_0/*") if p.name.isdigit()]

    def _log(self, rank: int, stream: str) -> str:
        for folder in self._rank_folders():
            if int(folder.name) == rank:
                return _text(folder / f"{stream}.log")
        return ""


class Run:
    """A run in progress, e.g. to send it a signal."""

    def __init__(self, process: subprocess.Popen | Command, out: Path):
        self.process, self.out, self.began = process, out, time.monotonic()

    def rank_pids(self) -> list[int]:
        """Process ids of the workers (torchrun's children)."""
        pid = self.process.pid
        try:
            listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            return []
        return [int(child) for child in listed.split()]

    def signal(self, number: int) -> None:
        """Sends a signal to torchrun and to its workers, as a batch system does."""
        # Workers lead sessions of their own: the launcher's group does not include them.
        for pid in (*self.rank_pids(), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stderr_of_start(self, number: int, rank: int) -> str:
        """What `rank` printed to stderr in the ranks' first start (0), or in a later one."""
        (log,) = self.out.glob(f"logs/*/attempt_{number}/{rank}/stderr.log")
        return _text(log)

    def wait(self, timeout: float = 300.0, check: bool = True) -> Result:
        """The result of the run.

        Raises:
            RanksFailedError: it took longer than `timeout` seconds, or (with `check`) failed.
        """
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            late = Result(-1, self.out, time.monotonic() - self.began)
            message = f"the ranks took longer than {timeout:g} s and were killed"
            raise RanksFailedError(f"{message}\n{late.report()}") from None
        result = Result(code, self.out, time.monotonic() - self.began)
        if check and code != 0:
            raise RanksFailedError(f"torchrun ended with {code}\n{result.report()}")
        return result

    def kill(self) -> None:
        """Ends the launcher and all of its workers at once, if they still run."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()


def start_ranks(
    script: str | Path,
    world_size: int,
    *args: str,
    env: dict[str, str] | None = None,
    out: Path | None = None,
    preloaded: bool = True,
    restarts: int = 0,
) -> Run:
    """Starts `world_size` processes of a script (a path) or a module (a dotted name).

    Args:
        script: a path ends in .py; relative paths start at the root of the repository.
        args: the script's arguments.
        env: added to this process's environment.
        out: folder of results and logs; None: a new temporary one.
        preloaded: as forks; False: by the command, every rank from the beginning.
        restarts: how often torchrun may start the ranks again.
    """
    out = Path(tempfile.mkdtemp(prefix="moss-ranks-")) if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    options = [
        "--nproc-per-node", str(world_size),
        "--standalone",  # a port that is free when it is bound, not a moment before
        "--log-dir", str(out / "logs"), "--redirects", "3", "--max-restarts", str(restarts),
    ]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), OUT: str(out), **(env or {})}
    environment, log = {**os.environ, **settings}, out / "torchrun.log"
    launcher, file = "torch.distributed.run", _file(script)
    if preloaded:
        arguments = torchrun(options, file, [*args])
        return Run(Command(launcher, arguments, environment, log), out)
    with log.open("w") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", launcher, *options, str(file), *args],
            cwd=REPO,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Run(process, out)


def run_ranks(
    script: str | Path,
    world_size: int,
    *args: str,
    env: dict[str, str] | None = None,
    timeout: float = 300.0,
    out: Path | None = None,
    check: bool = True,
    preloaded: bool = True,
) -> Result:
    """As `start_ranks`, then waits. With `check=False`, a failed run is returned, not raised."""
    run = start_ranks(script, world_size, *args, env=env, out=out, preloaded=preloaded)
    return run.wait(timeout, check)


def _file(script: str | Path) -> Path:
    """The file of a script or of a module, in the repository."""
    name = str(script)
    return REPO / (name if name.endswith(".py") else name.replace(".", "/") + ".py")


def save_result(name: str, value: Any, as_json: bool = False) -> None:
    """In a worker: leaves `value` for the test, under this rank's number."""
    path = Path(os.environ[OUT]) / f"{name}.rank{os.environ.get('RANK', '0')}"
    if as_json:
        path.with_name(path.name + ".json").write_text(json.dumps(value))
    else:
        torch.save(value, path.with_name(path.name + ".pt"))


def free_port() -> int:
    """A TCP port that nothing listens on, for what cannot be given 0. Nobody else takes it before
    it is bound: systems give connections other ports, and each worker of pytest has its own."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    while True:
        port = _PORTS + _PORTS_EACH * int(worker) + next(_tried) % _PORTS_EACH
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_TAIL:])
