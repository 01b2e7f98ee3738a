"""Large copies from the host to a device: threads fill a ring of page-locked buffers, from which
the device copies while others are filled.

A copy straight from a mapped file goes through a buffer of the driver, which one thread fills while
the device waits for it. That is done all the same where the ring does not prove right (`works`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline import devices
from data_pipeline.kernel_proof import Case, Kernel, proven

THREADS = 4
SIZE = 16 << 20  # bytes of a buffer, of which each thread has two: one is filled, one is copied


def copy_all(
    pairs: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    threads: int = THREADS,
    size: int = SIZE,
) -> None:
    """Copies each source, in host memory, to its target on the device, which has its shape. The
    dtype may be another: threads convert. Only the calling thread asks anything of the device, for
    whose last copies it does not wait; `pairs` may make a target when it is asked for it.

    Raises:
        Exception: a source cannot be read.
    """
    ring = [_Buffer(size, device) for _ in range(2 * threads)]
    filling = deque[tuple[Future[Tensor], _Buffer, Tensor]]()
    with ThreadPoolExecutor(threads, thread_name_prefix="moss-staging") as pool:
        for number, (source, target) in enumerate(_pieces(pairs, size)):
            if len(filling) == len(ring):  # the oldest one's buffer is next
                _send(*filling.popleft())
            buffer = ring[number % len(ring)]
            filling.append((pool.submit(buffer.fill, source, target.dtype), buffer, target))
        for oldest in filling:
            _send(*oldest)


class _Buffer:
    def __init__(self, size: int, device: torch.device):
        self.device, self.pins = device, devices.pins(device)
        self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.pins)
        self.copied: Any = None  # the device reaches it when it has read the buffer

    def fill(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """The source's numbers, in the buffer."""
        if self.copied is not None:
            self.copied.synchronize()
        own = self.memory[: source.numel() * dtype.itemsize]
        return own.view(dtype).view(source.shape).copy_(source)


def _send(filled: Future[Tensor], buffer: _Buffer, target: Tensor) -> None:
    target.copy_(filled.result(), non_blocking=True)
    if buffer.pins:
        buffer.copied = devices.mark(buffer.device)


def _pieces(pairs: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cuts each pair into pieces that fit a buffer: between any two numbers, or, of a slice of
    columns, between two rows."""
    for source, target in pairs:
        if source.is_contiguous():
            source, target = source.view(-1), target.view(-1)
        rows = size // (source[:1].numel() * target.itemsize)
        yield from zip(source.split(rows), target.split(rows), strict=True)


@cache
def works(device: torch.device) -> bool:
    """Whether what goes through the ring arrives on a device as it was: of those that read
    page-locked memory, it is tried once on each (kernel_proof.py)."""
    if not devices.pins(device):
        return False
    name, cases = "loading through page-locked memory", partial(_cases, device)
    return proven(Kernel(name, "", ("torch",), (__name__,), cases), device)


def _cases(device: torch.device) -> Iterator[Case]:
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device)
    run = partial(_while_busy, device)
    yield Case("a device that is busy", run, torch.clone, (drawn,), gradients=False)


def _while_busy(device: torch.device, x: Tensor) -> Tensor:
    """`x` by way of the host. The copies wait for products, so that a buffer which is filled before
    its copy has ended shows."""
    host, target = x.cpu(), torch.zeros_like(x)
    product = torch.ones(1024, 1024, device=device)
    for _ in range(30):
        product = torch.mm(product, product)
    copy_all([(host, target)], device, size=1 << 16)
    return target


def to_device(source: Tensor, device: torch.device) -> Tensor:
    """A large tensor on the device: itself, where it is there."""
    if devices.is_accelerator(source) or not works(device):
        return source.to(device)
    target = torch.empty_like(source, device=device)
    copy_all([(source, target)], device)
    return target


def move(model: nn.Module, device: torch.device) -> None:
    """A model's tensors to the device, those that are elsewhere."""

    def moved() -> Iterator[tuple[Tensor, Tensor]]:
        for module in model.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, source in own:
                if devices.is_accelerator(source):
                    continue
                target = torch.empty_like(source, device=device)
                is_weight = isinstance(source, nn.Parameter)
                setattr(module, name, nn.Parameter(target, False) if is_weight else target)
                yield source.detach(), target

    if works(device):
        copy_all(moved(), device)
    model.to(device)
