"""Which ranks are slower than the others, and in what; `trainer.slow_ranks_every` says how often.

The ranks of a step end together, so the step's time says nothing. Phases do, in which a rank works
for itself; in the others (`exchange`, `update`) the fast ones wait for the slow one.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Mapping
from statistics import median

import torch.distributed as dist

PHASES = ("data", "encode", "plan", "forward", "backward")
SLOWER = 1.25  # than the median
LEAST = 0.05  # of the steps' time, that a phase must take to be named


class Stragglers:
    """Sums this rank's seconds of each phase, and compares them with the others'."""

    def __init__(self, every: int | None):
        self.every, self._steps = every, 0
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, phases: Mapping[str, float]) -> list[str]:
        """Counts a step; after `every` steps the slow ranks, each with its host. A collective then,
        whose answer rank 0 gets.
        """
        if self.every is None:
            return []
        for name in PHASES:
            self._seconds[name] += phases.get(name, 0.0)
        self._seconds["all"] += sum(phases.values())
        self._steps += 1
        if self._steps < self.every:
            return []
        own = (socket.gethostname(), dict(self._seconds))
        everywhere: list[tuple[str, dict[str, float]]] = [own] * dist.get_world_size()
        dist.all_gather_object(everywhere, own)
        self._steps = 0
        self._seconds.clear()
        return slow_ranks(everywhere)


def slow_ranks(everywhere: list[tuple[str, dict[str, float]]]) -> list[str]:
    """`forward: rank 3 on node2 takes 1.40 times the median`, the slowest first.

    everywhere: of each rank its host and the seconds of each phase and of all together (`all`).
    """
    found = []
    whole = median(seconds["all"] for _, seconds in everywhere)
    for phase in PHASES:
        usual = median(seconds[phase] for _, seconds in everywhere)
        for rank, (host, seconds) in enumerate(everywhere):
            over = seconds[phase] - usual
            if over > LEAST * whole and seconds[phase] > SLOWER * usual:
                times = f"{seconds[phase] / usual:.2f} times" if usual else "more than"
                line = f"{phase}: rank {rank} on {host} takes {times} the median"
                found.append((over, line))
    return [line for _, line in sorted(found, reverse=True)]
