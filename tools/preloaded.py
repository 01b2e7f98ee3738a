"""Starts commands as forks of a process that has imported torch and megatron.

Importing them takes five seconds of a core in each process, which is most of a chain of short jobs
such as the demo and the tests. Here one process imports them (Python's fork server), and commands
are forks of it; torchrun starts its ranks as forks of itself (with its own options `--run-path` and
`--start-method`). The commands are the same as in a shell.
"""

from __future__ import annotations

import atexit
import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from data_pipeline.parent import signalled_with_parent

REPO = Path(__file__).resolve().parents[1]
# macOS has no safe fork once its frameworks are loaded: imports are repeated there.
METHOD = "fork" if sys.platform == "linux" else "spawn"


class Command:
    """A running command, with a part of the interface of subprocess.Popen."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        folder: Path | None = None,
    ):
        """Starts `python -m module arguments`.

        Args:
            module: a dotted name.
            environment: all of the command's; None: this process's.
            log: file for what the command prints; the command then leads a session of its own.
                None: it prints where this process does.
            folder: where the command works; None: where this process does.
        """
        own = dict(os.environ if environment is None else environment)
        self.args = [module, *arguments]
        start = (self.args, own, log and str(log), folder or Path.cwd())
        self.process: BaseProcess = _context().Process(target=_run, args=start)  # type: ignore
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """The exit code; None while the command runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once the command has ended.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.process.exitcode


def torchrun(options: list[str], script: Path, arguments: list[str]) -> list[str]:
    """Arguments of the module torch.distributed.run for a script whose ranks are forks, on one
    machine."""
    forks = ["--run-path", "--start-method", METHOD]
    # A machine often does not know itself by the name that it has: ranks would look for it.
    forks += ["--local-addr", "127.0.0.1"]
    return [*options, *forks, __file__, str(script), *arguments]


def run(module: str, *arguments: str) -> None:
    """Runs a command to its end; CalledProcessError where it fails."""
    command = Command(module, list(arguments))
    code = command.wait()
    if code != 0:
        raise subprocess.CalledProcessError(code, command.args)


def python_path() -> str:
    """`PYTHONPATH` of a process that imports this checkout."""
    return os.pathsep.join(path for path in (str(REPO), os.environ.get("PYTHONPATH")) if path)


@cache
def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver" if METHOD == "fork" else METHOD)
    if METHOD == "fork":
        context.set_forkserver_preload(["tools.preloaded_modules"])
        # The warnings are megatron's, of packages that it could have used. Libraries read the
        # number of threads when they are loaded: ranks and commands set their own.
        settings = {"PYTHONPATH": python_path(), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        before = os.environ.copy()
        os.environ.update(settings)
        forkserver.ensure_running()
        os.environ.clear()
        os.environ.update(before)
    return context


def _run(command: list[str], environment: Mapping[str, str], log: str | None, folder: Path) -> None:
    """Runs a command in the new process."""
    if METHOD == "fork":  # of the server, which ends with the process that has asked for this one
        signalled_with_parent(os.getppid(), signal.SIGTERM)
    # As in a shell: else this one's processes would be forks of a server of its own, which a signal
    # to all processes ends, and they with it.
    multiprocessing.set_start_method(None, force=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if log is not None:
        os.setsid()
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    # They are there, unless this process's parent had a server already, for other modules: each
    # process has one. Then they are imported here, once for a torchrun and its ranks.
    with warnings.catch_warnings(action="ignore"):
        import_module("tools.preloaded_modules")
    sys.argv = command
    if "--start-method" in command:
        _release_ended_ranks()
        _kill_stopped_ranks_in_time()
        _name_frames_without_a_file()
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _release_ended_ranks() -> None:
    """Patches torchrun, where ranks that are forks end only when all have: one that has ended would
    wait for ever after torchrun stops the others."""
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext

    close = MultiprocessContext._close

    def release_and_close(self: MultiprocessContext, *arguments: Any, **options: Any) -> None:
        self._worker_finished_event.set()
        close(self, *arguments, **options)

    MultiprocessContext._close = release_and_close  # type: ignore[method-assign]


def _kill_stopped_ranks_in_time() -> None:
    """In torchrun: where a rank fails, another that does not end on SIGTERM is killed after the
    time that torchrun gives to ranks that are no forks; for forks torch has 30 seconds of its own.
    """
    from torch.multiprocessing.spawn import ProcessContext

    join = ProcessContext._join_procs_with_timeout

    def join_in_time(self: ProcessContext, timeout: float) -> None:
        join(self, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", timeout)))

    ProcessContext._join_procs_with_timeout = join_in_time  # type: ignore[method-assign]


def _name_frames_without_a_file() -> None:
    """torchrun asks nine times who calls. `inspect` would look through all modules for each frame
    that has no file, which takes half a second of a core with as many modules as there are here.
    """
    inspect.modulesbyfile.update({"<string>": "__main__", "<frozen runpy>": "runpy"})  # type: ignore[attr-defined]


def _rank() -> None:
    """Runs, in a rank, the script that is named first, as an interpreter of its own would."""
    del sys.argv[0]
    launcher = os.getppid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not torchrun's handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if METHOD == "fork":
        from moss_train.train.process import start_writer_queue

        start_writer_queue()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise  # for torchrun a rank that has ended well returns
    except Exception:  # a fork reports only to its parent
        traceback.print_exc()
        raise
    atexit._run_exitfuncs()  # a rank that has returned waits for the others, which may wait for it
    if METHOD == "fork":
        signalled_with_parent(
            launcher
        )  # it waits for torchrun to say that all have, without an end


if __name__ == "__main__":
    _rank()
