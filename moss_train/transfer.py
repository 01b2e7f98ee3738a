"""What crosses between host and device memory, without a wait.

A copy from ordinary memory to a GPU, or a value that Python reads from it, makes the host wait
until the GPU has done all that it was given so far, and the GPU wait for what the host gives next.
Here copies go through page-locked memory, many tensors in one, and numbers are fetched while both
go on. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from data_pipeline.devices import is_accelerator
from moss_train import hardware

ALIGNMENT = 16  # bytes, of each tensor in a common buffer: no type and no kernel asks for more


class Movable(Protocol):
    """An object whose attributes named in `on_device` belong into the device's memory.

    They are tensors, objects of this kind, lists of these, or None.
    """

    @property
    def on_device(self) -> tuple[str, ...]:
        """Names of attributes."""


class Staged:
    """What `owners` hold for the device, in page-locked memory: all but the copy is done."""

    def __init__(self, *owners: Movable):
        self._slots: list[tuple[Any, str]] = []
        if not hardware.on_accelerator():
            return
        self._slots = [slot for owner in owners for slot in _slots(owner)]
        self._buffer = _Buffer([getattr(owner, name) for owner, name in self._slots])

    def move(self) -> None:
        """Moves it, in place, by one copy that nobody waits for. Once; then it is there."""
        slots, self._slots = self._slots, []
        if slots:
            for (owner, name), tensor in zip(slots, self._buffer.to_device(), strict=True):
                setattr(owner, name, tensor)
            del self._buffer


def move(*owners: Movable) -> None:
    """Moves what `owners` hold for the device, in place, by one copy that nobody waits for."""
    Staged(*owners).move()


def _slots(owner: Any) -> Iterator[tuple[Any, str]]:
    for name in owner.on_device:
        value = getattr(owner, name, None)
        if isinstance(value, Tensor):
            yield owner, name
        elif value is not None:
            for inner in value if isinstance(value, list) else [value]:
                yield from _slots(inner)


def to_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the device's memory, by one copy that nobody waits for."""
    return _Buffer(tensors).to_device() if hardware.on_accelerator() else list(tensors)


class _Buffer:
    """Tensors one after the other in page-locked memory."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors, self._starts, size = tensors, list[int](), 0
        for tensor in tensors:
            self._starts.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for own, tensor in zip(self._parts(self._pinned), tensors, strict=True):
            own.copy_(tensor)

    def to_device(self) -> list[Tensor]:
        # torch keeps the page-locked memory until the copy has ended.
        return self._parts(self._pinned.to(hardware.device(), non_blocking=True))

    def _parts(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for start, like in zip(self._starts, self._tensors, strict=True)
        ]


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat(tensors)` on the host, page-locked where there is a GPU."""
    if not hardware.on_accelerator():
        return torch.cat([*tensors])
    shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
    pinned = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=True)
    return torch.cat([*tensors], out=pinned)


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers on `device`, made once in a process. Not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


class HostCopy:
    """A vector of the device on its way to the host."""

    def __init__(self, numbers: Tensor):
        # From a GPU into page-locked memory: torch allocates it for such a copy.
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._copied = hardware.new_event() if is_accelerator(numbers) else None
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> list[float]:
        """The numbers, once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()
