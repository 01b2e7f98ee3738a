"""Cheap activations that the backward pass computes again instead of keeping them.

A linear layer keeps its input for the gradient of its weights. Where that is the output of a norm
or of an activation function, it costs no matrix product to compute it again:

    x = recomputable(True, gelu, hidden)  # hidden is kept anyway, for the gradient of gelu
    with recomputed(x):
        y = linear(x)                # keeps how x is computed, not x

The same operator runs on the same numbers, so that no gradient changes, not by a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def selective(config: TransformerConfig) -> bool:
    """Whether `parallel.recompute` asks for it."""
    return config.recompute_granularity == "selective"


def recomputable(recompute: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`, which must not keep its output for its own backward pass."""
    out = function(*inputs)
    if recompute and out.requires_grad:
        out.recompute = partial(function, *inputs)  # type: ignore[attr-defined]
    return out


def recomputed(x: Tensor) -> AbstractContextManager:
    """Inside, autograd does not keep `x`, if it comes from `recomputable`."""
    recompute = getattr(x, "recompute", None)
    if recompute is None:
        return nullcontext()
    # `pack` must not hold x: the graph keeps it.
    storage, size, later = x.untyped_storage()._cdata, x.numel(), _Later(recompute)

    def pack(kept: Tensor) -> Any:
        if kept.untyped_storage()._cdata != storage or kept.numel() != size:
            return kept
        later.readers += 1
        return kept.size(), kept.stride()

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else later.read().as_strided(*kept)

    return saved_tensors_hooks(pack, unpack)


class _Later:
    """A tensor that is computed when the first of its readers wants it."""

    def __init__(self, function: Callable[[], Tensor]):
        self.function, self.readers = function, 0
        self.value: Tensor | None = None

    def read(self) -> Tensor:
        value = self.value
        if value is None:
            with torch.no_grad():
                value = self.function()
        self.readers -= 1
        self.value = value if self.readers > 0 else None
        return value
