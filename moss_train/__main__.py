"""A training run: `torchrun --nproc-per-node N -m moss_train stage=pt1 ...`, or `moss-train ...`
for one process. Where there is a checkout, launch/train.py is the same.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from data_pipeline.commands import DONE
from data_pipeline.imports import uncollected
from moss_train.processes import PROGRAM, end_with_launcher

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> int:
    """Composes the configuration and runs the job on this rank; the exit code."""
    end_with_launcher()  # before the imports, which take seconds
    from moss_train.compose import run_command_line

    return run_command_line(_train, PROGRAM) or DONE


def _train(raw: DictConfig) -> None:
    """torch is imported only now: what Hydra refuses, or is asked to show, takes half a second."""
    with uncollected():
        from torch.distributed.elastic.multiprocessing.errors import record

        from moss_train.main import train

    record(train)(raw)


if __name__ == "__main__":
    sys.exit(main())
