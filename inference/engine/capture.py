"""Capturing a computation as a graph (as CUDA's), and seeing that it computes the same.

Several ranks capture the same at once, and a pass has collectives in it: what fails on one of them
alone must not leave the others waiting there. What may fail on one is asked of all (`Ranks`), and
is left out on all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from data_pipeline import devices

log = logging.getLogger(__name__)

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels
TOLERANCE = 1e-2  # of the largest number: kernels may be chosen anew

Result = TypeVar("Result")


class Graph(Protocol):
    """A computation that a device has recorded."""

    def replay(self) -> None:
        """Computes it once more."""


class GraphError(RuntimeError):
    """A computation has no graph, on any rank. All ranks raise it."""


@dataclass(frozen=True)
class Ranks:
    """Who captures.

    count: how many; leads: this one speaks for all.
    agree: from what is wrong on this rank ("": nothing) to what is on any, the same on all.
    """

    count: int = 1
    leads: bool = True
    agree: Callable[[str], str] = str

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work`, in which no rank waits for another, returns.

        Raises:
            GraphError: on all ranks, where it raises RuntimeError on one.
        """
        wrong, done = "", []
        try:
            done.append(work())
        except RuntimeError as error:
            wrong = str(error).partition("\n")[0] or type(error).__name__
        wrong = self.agree(wrong)
        if wrong:
            raise GraphError(wrong)
        return done[0]


ALONE = Ranks()


class Pool:
    """Graphs of one device that share memory: no two of them may run at once."""

    def __init__(self, device: torch.device, ranks: Ranks = ALONE):
        self._device, self._torch, self._ranks = device, devices.module(device.type), ranks
        self._handle = self._torch.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace for each stream that has ever multiplied.
        self._side = self._torch.Stream(device)

    def capture(self, compute: Callable[[], Result]) -> tuple[Graph, Result]:
        """A graph of `compute`, and what it returned: tensors that each replay fills anew.

        Raises:
            GraphError: it cannot be captured. RuntimeError: it cannot be computed.
        """
        ours, side = self._torch, self._side
        side.wait_stream(ours.current_stream())
        with ours.stream(side):
            for _ in range(WARM_UP):
                compute()
        ours.current_stream().wait_stream(side)
        return self._ranks.together(lambda: self._record(compute))

    def _record(self, compute: Callable[[], Result]) -> tuple[Graph, Result]:
        """Nothing runs meanwhile: collectives are recorded, too."""
        graph, stream = devices.new_graph(self._device), _capture_stream(self._device)
        with self._torch.graph(graph, pool=self._handle, stream=stream):
            out = compute()
        return graph, out


@cache
def _capture_stream(device: torch.device) -> Any:
    """The stream on which graphs of a device are captured: one for all pools, as `side` is one for
    all graphs of a pool. torch's own is on the device on which a process has captured first."""
    return devices.module(device.type).Stream(device)


@contextmanager
def or_without(what: str, ranks: Ranks, *graphs: dict[Any, Any]) -> Iterator[None]:
    """Lets `what` run without graphs where a capture fails, or a graph computes something else: its
    `graphs` are emptied, on all ranks, and a line says so.

    Of several ranks, one on which a pass itself fails raises that, and so ends all: the others
    wait in it.
    """
    try:
        yield
    except RuntimeError as error:
        if ranks.count > 1 and not isinstance(error, GraphError):
            raise
        if ranks.leads:
            why = str(error).partition("\n")[0]
            log.warning("no graphs: %s run without them: %s", what, why)
        for captured in graphs:
            captured.clear()


def check_same(what: str, result: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError where a graph's result is not that of the same computation without it."""
    error = (result.float() - expected.float()).abs().max().item()
    if not error <= TOLERANCE * expected.float().abs().max().item():
        raise RuntimeError(f"the graph of {what} is off by {error:.1e}")
