"""A job in which a rank meets an error in its third step: faulty.py HOW RANK OVERRIDE...

raise: the rank raises. tokens: the rank, which leads a replica, reads a token that the vocabulary
does not have. loader: the rank, which leads a replica, cannot read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.batch import MicroBatch
from moss_train.compose import load_config
from moss_train.imports import quick_imports
from moss_train.log import configure
from moss_train.main import check

STEP = 3


@record
def main() -> None:
    how, rank, *overrides = sys.argv[1:]
    configure()
    config = load_config(overrides=overrides)
    resume_from = check(config)
    with quick_imports():
        from moss_train.parallel.distribute import StepBatch
        from moss_train.train.loop import Job
        from moss_train.train.process import process_group
        from moss_train.train.step_plan import StepPlan

    class Faulty(Job):
        """A job with a bad day."""

        def _read(self) -> tuple[StepBatch, StepPlan]:
            unlucky = dist.get_rank() == int(rank)
            if unlucky and self.done == STEP - 1 and how == "raise":
                raise ValueError(f"rank {rank} has a bad day")
            if unlucky and self.done == STEP - 2 and how in SPOILED:  # the next step is read ahead
                assert self.reader.batches is not None
                self.reader.batches = SPOILED[how](self.reader.batches)
            return super()._read()

    with process_group(config):
        Faulty(config, resume_from).run()


def spoiled(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same batches, with a token in each that the vocabulary does not have."""
    for batch in batches:
        batch.tokens[0, 0] = 70_000
        yield batch


def failing(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """One batch, then an error."""
    yield next(batches)
    raise OSError("the storage has a bad day")


SPOILED = {"tokens": spoiled, "loader": failing}


if __name__ == "__main__":
    main()
