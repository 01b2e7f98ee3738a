"""Runs a replica that is shared among several GPUs: its ranks, by torchrun, and one line about the
rank that has ended all of them:
python -m inference.replicas.ranks REPLICA RANKS FOLDER FLAGS..."""

from __future__ import annotations

import logging
import os
import signal
import sys

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
    os.environ[NAMED] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN)
    logging.disable(logging.ERROR)  # torchrun's 30 lines about what one says here
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--log-dir={folder}"]
    try:
        run.run(run.parse_args([*options, "-m", "inference.serve", *flags]))
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        words = f"replica {replica}: rank {rank} (process {failure.pid}) ended ({_how(failure)})"
        print(f"{words}, and with it the other ranks", file=sys.stderr, flush=True)
        return FAILED
    return DONE


def _how(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return signal.Signals(-failure.exitcode).name
    return f"exit code {failure.exitcode}"


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
