"""A training run: `torchrun --nproc-per-node N -m moss_train stage=pt1 ...`, or `moss-train ...`
for one process. Where there is a checkout, launch/train.py is the same.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from moss_train.compose import run_command_line
from moss_train.main import PROGRAM, train


@record
def main() -> int:
    """Composes the configuration and runs the job on this rank; the exit code."""
    return run_command_line(train, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
