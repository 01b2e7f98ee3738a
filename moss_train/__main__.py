"""A training run: `torchrun --nproc-per-node N -m moss_train stage=pt1 ...`, or `moss-train ...`
for one process. Where there is a checkout, launch/train.py is the same.
"""

from __future__ import annotations

import sys
from functools import partial

from data_pipeline.commands import DONE
from moss_train.processes import end_with_launcher


def main() -> int:
    """Composes the configuration and runs the job on this rank; the exit code."""
    end_with_launcher()  # before the imports, which take seconds
    from torch.distributed.elastic.multiprocessing.errors import record

    from moss_train.compose import run_command_line
    from moss_train.main import PROGRAM, train

    return record(partial(run_command_line, train, PROGRAM))() or DONE


if __name__ == "__main__":
    sys.exit(main())
