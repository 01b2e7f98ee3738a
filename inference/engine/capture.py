"""Capturing a computation as a CUDA graph, and seeing that the graph computes the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WARM_UP = 3  # runs before a capture, in which libraries choose their kernels
TOLERANCE = 1e-2  # of the largest number: kernels may be chosen anew

Result = TypeVar("Result")


def capture(compute: Callable[[], Result], pool: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `compute`, and what it returned: tensors that each replay fills anew.

    pool: of memory, `torch.cuda.graph_pool_handle()`; graphs of one pool must not run at once.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = compute()
    return graph, out


@contextmanager
def or_without(what: str, *graphs: dict[Any, Any]) -> Iterator[None]:
    """Where a capture fails, or a graph computes something else, `what` runs without: its `graphs`
    are emptied, and a line says so."""
    try:
        yield
    except RuntimeError as error:
        log.warning("no CUDA graphs: %s run without them: %s", what, str(error).partition("\n")[0])
        for captured in graphs:
            captured.clear()


def check_same(what: str, got: Tensor, wanted: Tensor) -> None:
    """Raises RuntimeError where a graph's result is not that of the same computation without it."""
    error = (got.float() - wanted.float()).abs().max().item()
    if not error <= TOLERANCE * wanted.float().abs().max().item():
        raise RuntimeError(f"the graph of {what} is off by {error:.1e}")
