"""Runs torchrun, with an exit code of its own (130) for a job that was stopped before its end.

    python launch/torchrun.py --nproc-per-node 8 launch/train.py stage=pt1 ...

torchrun takes every code of a rank but 0 for a failure, kills the others and starts them again. So
ranks that stop on a signal end with 0 and leave a note. This command ends with 130 where it finds
the note (on each machine its own), or was itself asked to stop, and a job script can put the job
into the queue again. After a signal ranks have TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds to save
(default: 270; of torchrun: 30).

--ft as the first argument: ft_launcher of nvidia-resiliency-ext in place of torchrun, with the same
options and its own (`--ft-rank-heartbeat-timeout 600`).
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

# A checkout works without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_pipeline.imports import uncollected

with uncollected():
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

from data_pipeline.commands import DONE, STOPPED, WRONG_USAGE
from moss_train.node_folders import claimed, remove, remove_unclaimed
from moss_train.processes import STOPPED_NOTE


def main(arguments: list[str] | None = None) -> int:
    """Runs torchrun with `arguments`; returns its exit code, or 130."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "270")
    # Else ranks that are started again may find the addresses of those that have ended.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    launch: Callable[[list[str]], object] = run.main
    if arguments[:1] == ["--ft"]:
        arguments, launch = arguments[1:], _ft_launcher()
    with _note() as note, _folder() as folder:
        os.environ[STOPPED_NOTE] = str(note)
        os.environ.setdefault("PET_LOG_DIR", str(folder))  # the default of torchrun's --log-dir
        stopped, code = False, DONE
        try:
            try:
                launch(arguments)
            finally:
                _ignore_signals()
        except SignalException as error:
            print(error, file=sys.stderr)
            stopped = True  # also before the ranks could say so, while they start
        except SystemExit as end:  # as ft_launcher always does
            code = end.code if isinstance(end.code, int) else DONE
        if not stopped and not note.stat().st_size:
            return code
    if int(os.environ.get("SLURM_NNODES", "1")) > 1:
        time.sleep(5)  # srun --kill-on-bad-exit ends the other machines, too
    return STOPPED


def _ignore_signals() -> None:
    """The ranks have ended. Of a signal that comes (again) from now on, torchrun's handler, which
    stays, would make a failure."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _ft_launcher() -> Callable[[list[str]], object]:
    """The `main` of ft_launcher, whose options are torchrun's and its own, `--ft-...`."""
    try:
        return import_module("nvidia_resiliency_ext.fault_tolerance.launcher").main
    except ImportError as error:
        print(f"launch/torchrun.py: error: --ft: pip install nvidia-resiliency-ext ({error})",
              file=sys.stderr)  # fmt: skip
        sys.exit(WRONG_USAGE)


@contextmanager
def _note() -> Iterator[Path]:
    """An empty file that ranks can write to. On Linux it is in memory: a launcher that is killed
    leaves nothing behind, and no disk can be full."""
    if sys.platform == "linux":
        file = os.memfd_create("stopped")
        yield Path(f"/proc/{os.getpid()}/fd/{file}")
        os.close(file)
    else:
        with tempfile.NamedTemporaryFile(prefix="moss-train-") as named:
            yield Path(named.name)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for torchrun's log and error files: by itself torchrun makes one for each job and
    keeps it."""
    prefix = f"moss-train-torchrun-{os.getuid()}-"
    remove_unclaimed(Path(tempfile.gettempdir()), prefix)
    # Under another name until it is claimed: a launcher that starts now would remove it.
    new = Path(tempfile.mkdtemp(prefix=f"new-{prefix}"))
    folder = new.with_name(new.name.removeprefix("new-"))
    # Ranks may be forks, which live a moment longer than a launcher that is killed.
    with claimed(new, by_forks=False):
        new.rename(folder)
        yield folder
        remove(folder)


if __name__ == "__main__":
    sys.exit(main())
