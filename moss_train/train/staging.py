"""Copies of a checkpoint's tensors in host memory, from which processes beside the job write it.

megatron-core copies them into page-locked memory, without waiting for each. So that training may go
on from there by default, the copies of a process's first save are compared with the tensors; where
they differ, this save and later ones copy one tensor after the other into ordinary memory.

The copies are kept here until the files are written. megatron-core 0.16 drops them when it has
started the writing processes, which share page-locked memory with this one: torch would give it to
the next batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor

from data_pipeline import cgroups
from data_pipeline.ranks import local_rank, ranks_of_machine
from moss_train import hardware
from moss_train.log import log

PIECE = 1 << 24  # bytes that are compared at once: a device may have little memory left

# A file of a checkpoint as megatron-core's writers take it: path, name, and what it holds.
Files = list[tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]]


class Staging:
    """How the tensors of a process's saves get to host memory."""

    def __init__(self, on_device: bool):
        """`on_device`: the tensors are a device's. Else they are in host memory already."""
        self.on_device = on_device
        self.right: bool | None = None  # megatron-core's copies; None: not compared yet
        self.copies: Files = []

    def checked(self, request: AsyncRequest) -> AsyncRequest:
        """The same `request`, whose copies are proven before anything is written of them, and kept
        until `release`."""
        if request.preload_fn is None or not self.on_device:
            return request
        copy, files = request.preload_fn, request.async_fn_args[1]

        if self.right is None:
            _warn_of_memory(files)

        def kept() -> Files:
            self.copies = self._copied(copy, files)
            return self.copies

        return request._replace(preload_fn=kept)

    def release(self) -> None:
        """Gives the copies' memory back: everything is written."""
        self.copies = []

    def _copied(self, copy: Any, files: Files) -> Files:
        if self.right is False:
            return _copied_one_by_one(files)
        copies: Files | None = None
        try:
            copies = copy()
            if self.right is None:
                self.right = _are_equal(files, copies)
            wrong = f"differ from what is on {hardware.device_name()}"
        except RuntimeError as error:  # on this rank alone: there is no such memory left, now
            reason = str(error).partition("\n")[0]
            wrong = f"cannot be made ({reason})"
        else:
            if self.right:
                return copies
        copies = None  # their memory, before as much is asked for
        log.warning(
            "copies of the checkpoint in page-locked memory %s: it is copied into ordinary memory, "
            "more slowly",
            wrong,
        )
        return _copied_one_by_one(files)


def _tensors(files: Files) -> Iterator[Tensor]:
    return (tensor for _, _, (_, tensors) in files for _, tensor in tensors)


def _copied_one_by_one(files: Files) -> Files:
    return [
        (path, name, (objects, [(item, tensor.cpu()) for item, tensor in tensors]))
        for path, name, (objects, tensors) in files
    ]


def _are_equal(files: Files, copies: Files) -> bool:
    """Whether all bits are, on the tensors' device."""
    return all(
        torch.equal(piece, copied.to(piece.device))
        for tensor, copy in zip(_tensors(files), _tensors(copies), strict=True)
        for piece, copied in zip(_pieces(tensor), _pieces(copy), strict=True)
    )


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.detach().reshape(-1).view(torch.uint8).split(PIECE)


def host_bytes(files: Files) -> int:
    """Bytes of page-locked memory that torch takes for the copies: it rounds each up to a power of
    two."""
    sizes = (tensor.nbytes for tensor in _tensors(files))
    return sum(1 << (size - 1).bit_length() for size in sizes if size)


def _warn_of_memory(files: Files) -> None:
    if local_rank() != 0:  # one line for each machine
        return
    ranks = ranks_of_machine()
    needed, free = ranks * host_bytes(files), cgroups.free_memory()
    if needed > free:
        log.warning(
            "the copies of a checkpoint take about %.1f GB of this machine's memory, of which "
            "%.1f GB are free: fewer ranks a machine (%d) need less",
            needed / 1e9,
            free / 1e9,
            ranks,
        )
