"""Capturing a computation as a graph (as CUDA's), and seeing that it computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Pool:
    """Graphs of one device that share memory: no two of them may run at once."""

    def __init__(self, device: torch.device):
        self._device, self._torch = device, devices.module(device.type)
        self._handle = self._torch.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace for each stream that has ever multiplied.
        self._side = self._torch.Stream(device)

    def capture(self, compute: Callable[[], Result]) -> tuple[Graph, Result]:
        """A graph of `compute`, and what it returned: tensors that each replay fills anew."""
        ours, side = self._torch, self._side
        side.wait_stream(ours.current_stream())
        with ours.stream(side):
            for _ in range(WARM_UP):
                compute()
        ours.current_stream().wait_stream(side)
        graph = devices.new_graph(self._device)
        with ours.graph(graph, pool=self._handle, stream=_capture_stream(self._device)):
            out = compute()
        return graph, out


@cache
def _capture_stream(device: torch.device) -> Any:
    """One for all pools of a device, as `side` is one for all graphs of a pool. torch's own is on
    the device on which a process has captured first."""
    return devices.module(device.type).Stream(device)


@contextmanager
def or_without(what: str, *graphs: dict[Any, Any]) -> Iterator[None]:
    """Where a capture fails, or a graph computes something else, `what` runs without: its `graphs`
    are emptied, and a line says so."""
    try:
        yield
    except RuntimeError as error:
        log.warning("no graphs: %s run without them: %s", what, str(error).partition("\n")[0])
        for captured in graphs:
            captured.clear()


def check_same(what: str, got: Tensor, wanted: Tensor) -> None:
    """Raises RuntimeError where a graph's result is not that of the same computation without it."""
    error = (got.float() - wanted.float()).abs().max().item()
    if not error <= TOLERANCE * wanted.float().abs().max().item():
        raise RuntimeError(f"the graph of {what} is off by {error:.1e}")
