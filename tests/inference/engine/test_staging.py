"""What goes through a ring of buffers arrives as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference.engine.staging import copy_all

CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def test_tensors_of_all_kinds_arrive() -> None:
    """Smaller and larger than a buffer of 256 bytes, in other dtypes, slices."""
    sources = [
        random(3),
        random(70, 40),
        random(70, 40)[10:33],
        random(70, 40)[:, 8:19],
        random(1, 200),
        random(50, 30, dtype=torch.bfloat16),
        random(50, 30)[:, ::2],
        torch.arange(300, dtype=torch.int8).view(30, 10),
        torch.tensor(2.5),
    ]
    dtypes = [torch.float32, torch.bfloat16] * 3 + [torch.float32, torch.int8, torch.float32]
    targets = [torch.zeros(x.shape, dtype=t) for x, t in zip(sources, dtypes, strict=True)]
    copy_all(zip(sources, targets, strict=True), CPU, threads=3, size=256)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source.to(target.dtype))


def test_a_source_that_cannot_be_read_stops_it() -> None:
    def pairs():
        yield random(9), torch.zeros(9)
        raise OSError("the disk has gone")

    with pytest.raises(OSError, match="the disk has gone"):
        copy_all(pairs(), CPU)
    with pytest.raises(RuntimeError, match="meta"):
        copy_all([(torch.empty(9, device="meta"), torch.zeros(9))], CPU)
