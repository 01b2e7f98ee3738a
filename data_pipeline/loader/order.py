"""Which samples make up step s? A function of the sources, the seed and s, in every layout.

The samples of a run are numbered. A step has the next `global_batch` numbers; each data-parallel
rank takes its part of them, in a row. The mixture says from which source a number is, and how many
numbers before were from it; the source's own order says which of its samples that is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data_pipeline.loader.mixture import Mixture
from data_pipeline.loader.shuffle import SourceOrder
from data_pipeline.loader.state import OrderState


class Pick(NamedTuple):
    """A sample of a step. number: in the run. source: its index. sample: its number there."""

    number: int
    source: int
    sample: int


class Turn(NamedTuple):
    """A microbatch, and the picks of later ones of the same loader process, fetched meanwhile."""

    picks: list[Pick]
    ahead: list[Pick]


@dataclass(frozen=True)
class Part:
    """What a data-parallel rank takes of each global batch: its `rank`-th part of `size`."""

    global_batch: int
    micro_batch: int
    rank: int
    size: int

    @property
    def batches(self) -> int:
        """Microbatches of this rank in a step."""
        return self.global_batch // (self.micro_batch * self.size)


class Order:
    """The order of a run's samples."""

    def __init__(self, orders: Sequence[SourceOrder], state: OrderState) -> None:
        """`orders`: of the sources of `state`, where the run begins or goes on."""
        self._orders, self._state = orders, state
        self._counted = state  # as far as `after` has counted
        shares = [source.share for source in state.sources.values()]
        self._mixture = Mixture(shares, state.seed)

    def after(self, samples: int) -> OrderState:
        """The state once `samples` more have been taken. Counted on from the last call: each save
        of a long run would else draw all its samples' sources again."""
        number = self._state.samples + samples
        begin = self._counted if self._counted.samples <= number else self._state
        counts = self._mixture.counts(begin.samples, number - begin.samples).tolist()
        sources = {
            name: replace(source, taken=source.taken + count)
            for (name, source), count in zip(begin.sources.items(), counts, strict=True)
        }
        self._counted = replace(begin, sources=sources, samples=number)
        return self._counted

    def batches(self, part: Part) -> Iterator[list[Pick]]:
        """The microbatches of a rank, without end."""
        number = self._state.samples
        taken = np.array([source.taken for source in self._state.sources.values()])
        mine = part.batches * part.micro_batch
        while True:
            sources = self._mixture.sources(number, part.global_batch)
            positions = np.empty_like(sources)
            for source in range(len(taken)):
                of_it = sources == source
                count = np.count_nonzero(of_it)
                positions[of_it] = taken[source] + np.arange(count)
                taken[source] += count
            picks = [
                Pick(number + place, source, self._orders[source].sample(position))
                for place, source, position in zip(
                    range(part.rank * mine, (part.rank + 1) * mine),
                    sources[part.rank * mine :].tolist(),
                    positions[part.rank * mine :].tolist(),
                    strict=False,  # the rest is the other ranks'
                )
            ]
            for first in range(0, mine, part.micro_batch):
                yield picks[first : first + part.micro_batch]
            number += part.global_batch


def turns(batches: Iterator[list[Pick]], processes: int, ahead: int) -> Iterator[Turn]:
    """Each microbatch, with the one that its process has `ahead` microbatches later; a process's
    first also with those in between. `processes` take the microbatches in turns.
    """
    coming: deque[list[Pick]] = deque()  # those after the one that is given
    for number in itertools.count():
        coming.extend(itertools.islice(batches, 1 + ahead * processes - len(coming)))
        picks = coming.popleft()
        if not ahead:
            yield Turn(picks, [])
            continue
        first = 1 if number < processes else ahead
        later = [coming[n * processes - 1] for n in range(first, ahead + 1)]
        yield Turn(picks, [pick for batch in later for pick in batch])
