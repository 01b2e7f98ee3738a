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
            return _RMSNorm.apply(x, self.weight, self.eps)
        normed = nn.functional.rms_norm(x.float(), self.weight.shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

    Autograd takes torch's own apart into some twenty operations; on a CPU a small model's norms
    took half as long again.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed, to_x, to_weight = x * scale, None, None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * normed).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            grad = grad * weight
            along = (grad * normed).mean(-1, keepdim=True)
            to_x = grad.addcmul_(normed, along, value=-1).mul_(scale)
        return to_x, to_weight, None
