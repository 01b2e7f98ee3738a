"""RMSNorm that knows about sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 over the last dimension, as in Llama.

    Built by megatron's layer specs with these keyword arguments.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # On a sequence shard each rank sees other tokens: its gradient is one part of a sum.
        if config.sequence_parallel:
            self.weight.partial_over_tensor = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float32:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(x.dtype)
