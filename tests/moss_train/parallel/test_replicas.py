"""What ranks that hold the same parameters compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moss_train.parallel import replicas


class _Largest(TorchDispatchMode):
    """The most numbers of 64 bits that a new tensor had."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype is torch.int64:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_checksums_are_sums_of_words_and_squares_that_wrap_made_piece_by_piece(dtype, monkeypatch):
    monkeypatch.setattr(replicas, "PIECE", 16)
    x = torch.randn(10, 25, generator=torch.Generator().manual_seed(0)).to(dtype)
    words = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    numbers = words.flatten().tolist()
    with _Largest() as seen:
        found = replicas._checksum(x).tolist()
    assert [n % 2**64 for n in found] == [sum(numbers) % 2**64, sum(n * n for n in numbers) % 2**64]
    if dtype is not torch.float64:  # whose words are numbers of 64 bits as they are
        assert seen.most <= 2 * 16
    assert numbers == words.flatten().tolist()


def test_a_parameter_without_numbers_has_a_checksum():
    assert replicas._checksum(torch.empty(0, 3)).tolist() == [0, 0]
