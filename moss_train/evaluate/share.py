"""Samples are shared out to the replicas, and what came of them is put together in their order.

A block of samples is computed together, wherever that is: results do not depend on the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from data_pipeline.batch import EncodedSample
from data_pipeline.schema import SampleError
from moss_train.evaluate.items import AnswerKey, EvaluationError, Item
from moss_train.evaluate.outcomes import Outcome
from moss_train.model.groups import Groups

BLOCK = 16  # samples of a source

OutcomesOf = Callable[[list[Item]], list[Outcome]]
Refuse = Callable[[Exception], None]
Thing = TypeVar("Thing")


class Shared(Protocol):
    """A model of several ranks."""

    groups: Groups


def share_out(
    model: Shared,
    items: Iterable[Item],
    outcomes_of: OutcomesOf,
    on_progress: Callable[[str], None] = lambda _: None,
    refuse: Refuse | None = None,
) -> list[Outcome]:
    """What `outcomes_of` gives for all items, on every rank. A collective.

    Args:
        items: read by the first rank of each replica; the others may give anything.
        outcomes_of: called by all ranks of a replica with one block after the other.
        on_progress: told of each source when all of it is read, on the first rank.
        refuse: called on the first rank of a replica with the error of a sample that cannot be
            used, which is left out; None: that is raised.

    Raises:
        EvaluationError, SampleError: what a replica met, on all ranks.
    """
    groups = model.groups
    done: dict[int, list[Outcome]] = {}
    error: Exception | None = None
    try:
        for number, block in _own_blocks(groups, items, on_progress, refuse):
            done[number] = outcomes_of(block) if block else []
    except (EvaluationError, SampleError) as caught:
        error = caught
    everywhere = gather(groups, (done, error))
    for _, other in everywhere:
        if other is not None:
            raise other
    merged = {number: found for part, _ in everywhere for number, found in part.items()}
    return [outcome for _, found in sorted(merged.items()) for outcome in found]


def gather(groups: Groups, own: Thing) -> list[Thing]:
    """What each replica has, on every rank. A collective."""
    if groups.data_size == 1:
        return [own]
    everywhere: list[Any] = [None] * groups.data_size
    dist.all_gather_object(everywhere, own, group=groups.decoder.dp)
    return everywhere


def _own_blocks(
    groups: Groups,
    items: Iterable[Item],
    on_progress: Callable[[str], None],
    refuse: Refuse | None,
) -> Iterator[tuple[int, list[Item]]]:
    """Number and samples of each block of this replica, on all of its ranks."""
    if groups.replica.size() == 1:
        yield from _read(groups, items, on_progress, refuse)
        return
    leader = dist.get_global_rank(groups.replica, 0)
    read = _read(groups, items, on_progress, refuse) if groups.is_leader else iter(())
    while True:
        sent: list[Any] = [None]
        if groups.is_leader:
            try:
                number, block = next(read, (-1, []))
                sent = [(number, [(item.answer_key(), item.encoded) for item in block])]
            except (EvaluationError, SampleError) as error:
                sent = [error]
        dist.broadcast_object_list(sent, leader, group=groups.host)
        (found,) = sent
        if isinstance(found, Exception):
            raise found
        number, pairs = found
        if number < 0:
            return
        yield number, [_item(*pair) for pair in pairs]


def _item(key: AnswerKey, encoded: EncodedSample) -> Item:
    return Item(**vars(key), encode=lambda: encoded)


def _read(
    groups: Groups,
    items: Iterable[Item],
    on_progress: Callable[[str], None],
    refuse: Refuse | None,
) -> Iterator[tuple[int, list[Item]]]:
    """The blocks of this replica, their samples encoded."""
    number = 0
    for source, own in groupby(items, lambda item: item.source):
        count = 0
        while block := list(islice(own, BLOCK)):
            count += len(block)
            if number % groups.data_size == groups.data_rank:
                yield number, [item for item in block if _usable(item, refuse)]
            number += 1
        if dist.get_rank() == 0:
            on_progress(f"{source}: {count} samples")


def _usable(item: Item, refuse: Refuse | None) -> bool:
    try:
        return item.encoded is not None
    except SampleError as error:
        if refuse is None:
            raise
        refuse(error)
        return False
