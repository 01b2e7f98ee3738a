"""Runs work on shards in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def each_shard(
    work: Callable[[Path], _Result], shards: Iterable[Path], workers: int
) -> Iterator[_Result]:
    """The results in the order of the shards, from `workers` processes; 0: from this one."""
    if workers == 0:
        yield from map(work, shards)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, shards)
