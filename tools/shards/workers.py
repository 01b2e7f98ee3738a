"""Runs work on shards in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import torch

from data_pipeline.parent import end_with_parent
from data_pipeline.shards import ShardError

_Result = TypeVar("_Result")


def each_shard(
    work: Callable[[Path], _Result], shards: Iterable[Path], workers: int
) -> Iterator[_Result]:
    """The results in the order of the shards, from `workers` processes; 0: from this one.

    Raises ShardError where one of them is killed.
    """
    if workers == 0:
        yield from map(work, shards)
        return
    try:
        with ProcessPoolExecutor(workers, None, _begin, (os.getpid(),)) as pool:
            yield from pool.map(work, shards)
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed, as where memory is short: fewer --workers need less"
        ) from None


def _begin(parent: int) -> None:
    end_with_parent(parent)  # else workers of a command that is killed wait for ever
    torch.set_num_threads(1)
