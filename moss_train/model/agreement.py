"""What ranks find out on their devices, and all of them must do the same: kernels, attention.

A rank that used another one than the others, or failed with it, would leave them in a collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from moss_train.log import log, print_line

Prove = Callable[[Sequence[str]], Sequence[str]]


def agreed(what: str, find: Callable[[], Sequence[str]], prove: Prove) -> list[str]:
    """The names that rank 0 finds, and all others prove. A collective.

    Rank 0 comes first: where machines share a home, the others find its verdicts there. What is not
    right on one rank is used on none; that rank says why, and rank 0 which one it is. Where memory
    is short on rank 0 it finds none.

    Args:
        what: they are names of, for that line.
        find: on rank 0. prove: on the others, which of those are right.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shared = [_unless_memory_is_short(what, find) if rank == 0 else []]
    dist.broadcast_object_list(shared, src=0)
    (names,) = shared
    if ranks == 1 or not names:
        return names
    own = names
    if rank > 0:
        with _warnings_logged():
            tried = f"{what} {', '.join(names)}"
            own = _unless_memory_is_short(tried, lambda: prove(names))
    everywhere: list[list[str]] = [[]] * ranks
    dist.all_gather_object(everywhere, own)
    lacking = {
        name: next((other for other, has in enumerate(everywhere) if name not in has), None)
        for name in names
    }
    for name, other in lacking.items():
        if other is not None:
            log.warning("%s %s: is not right on rank %d: no rank uses it", what, name, other)
    return [name for name in names if lacking[name] is None]


def _unless_memory_is_short(what: str, find: Callable[[], Sequence[str]]) -> list[str]:
    """What `find` gives; nothing where the memory of this device is short, which says so."""
    try:
        return [*find()]
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        print_line(f"{what}: not tried on this rank: {reason}")
        return []


@contextmanager
def _warnings_logged() -> Iterator[None]:
    """Of a rank that else tells errors only."""
    before = log.level
    log.setLevel(min(before, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(before)
