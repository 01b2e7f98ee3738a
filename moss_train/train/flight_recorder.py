"""What NCCL's flight recorder knows of the last collectives, when a job hangs.

torch keeps it for each rank, and writes it when somebody writes to a pipe of the rank's (torch's
ProcessGroupNCCL.hpp, `DumpPipe`). To read the dumps of all ranks:
`python -m torch.distributed.flight_recorder.fr_trace HANG --prefix nccl_`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PIPE, DUMP = "nccl_pipe_", "nccl_"  # torch adds RANK.pipe, RANK


def prepare(folder: Path) -> None:
    """Before the process group starts: where this rank's pipe and dump are, and a dump where a
    collective takes longer than `hardware.timeout_s`. What the user has set stays."""
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", str(folder / PIPE))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # before torch 2.9
        os.environ.setdefault(name, str(folder / DUMP))


def request_dumps(folder: Path, ranks: Iterable[int]) -> None:
    """Asks for the dumps of ranks of this machine; on a CPU there is nobody to ask."""
    for rank in ranks:
        with suppress(OSError):  # no pipe, or nobody reads it
            pipe = os.open(folder / f"{PIPE}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            os.write(pipe, b"1\n")
            os.close(pipe)


def collect(folder: Path, ranks: Iterable[int], out: Path) -> None:
    """Copies what has been written. Raises OSError."""
    for rank in ranks:
        dump = folder / f"{DUMP}{rank}"
        if dump.exists():
            shutil.copy(dump, out)
