"""What is computed of a model's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moss_train.evaluate.replica import SCORED_AT_ONCE, likely_and_chances


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest fp32 tensor that an operator makes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.count = max(self.count, out.numel())
        return out


def test_scores_of_many_tokens_are_exact_and_take_little_memory() -> None:
    """All logits of 8192 tokens at once, twice in fp32, are 8 GB beside those in bf16."""
    words, length = 50, 3 * SCORED_AT_ONCE + 7
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, words, (length,), generator=generator)
    logits = 9 * torch.randn(length, words, generator=generator).bfloat16()
    with Largest() as largest:
        likely, chances = likely_and_chances(tokens, logits)
    expected = logits.double().log_softmax(-1)
    rows = torch.arange(length - 1)
    torch.testing.assert_close(chances[1:], expected[rows, tokens[1:]], rtol=1e-5, atol=1e-5)
    assert torch.equal(likely.long(), expected.argmax(-1))
    assert largest.count == SCORED_AT_ONCE * words
