"""Runs a replica that is shared among several GPUs: its ranks, by torchrun, and one line about the
rank that has ended all of them:
python -m inference.replicas.ranks REPLICA RANKS FOLDER FLAGS..."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from data_pipeline.commands import DONE, FAILED
from inference.engine.lifeline import NAMED

# Seconds: a rank that waits for one that has gone does not notice a signal, and the next start of
# the replica waits for its end.
_SHUTDOWN = "10"


def main(replica: str, ranks: str, folder: str, *flags: str) -> int:
    """Runs a replica's ranks until all have ended; returns the exit code. folder: for what torchrun
    writes."""
    os.environ["MOSS_END_WITH_PARENT"] = str(os.getpid())
    note = Path(folder, f"gone-{replica}")
    note.unlink(missing_ok=True)
    os.environ[NAMED] = str(note)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN)
    logging.disable(logging.ERROR)  # torchrun's 30 lines about what one says here
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={folder}"]
    try:
        run.run(run.parse_args([*options, "-m", "inference.serve", *flags]))
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = _first(error, note)
        words = f"replica {replica}: rank {rank} (process {failure.pid}) ended ({_how(failure)})"
        print(f"{words}, and with it the other ranks", file=sys.stderr, flush=True)
        return FAILED
    return DONE


def _first(error: ChildFailedError, note: Path) -> tuple[int, ProcessFailure]:
    """The rank that has ended the others, as they say. torchrun, which looks now and then, may find
    several that have ended, and cannot tell which was the first."""
    with contextlib.suppress(OSError, ValueError):  # none of the others has come to say it
        rank = int(note.read_text())
        if rank in error.failures:
            return rank, error.failures[rank]
    return error.get_first_failure()


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return signal.Signals(-failure.exitcode).name
    return f"exit code {failure.exitcode}"


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
