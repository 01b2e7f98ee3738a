"""Norms: the decoder's RMSNorm, which knows about sequence parallelism, the tower's LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from data_pipeline.devices import has_fused_norm, is_accelerator
from data_pipeline.fp8 import Fp8
from moss_train.model.recompute import recomputable, selective


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 over the last dimension, as in Llama.

    Built by megatron's layer specs with these keyword arguments.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any):
        super().__init__()
        self.eps, self.recompute = eps, selective(config)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # On a sequence shard each rank sees other tokens: its gradient is one part of a sum.
        if config.sequence_parallel:
            self.weight.partial_over_tensor = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Keeps x and a factor for each position, nothing in fp32 of the size of x."""
        norm = rms_norm if _FUSED and is_accelerator(x) else _RMSNorm.apply
        return recomputable(self.recompute, norm, x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, which the layer behind it need not keep the output of."""

    def __init__(self, config: TransformerConfig):
        super().__init__(
            config.hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype
        )
        self.recompute = selective(config)

    def forward(self, x: Tensor, fp8: Fp8 | None = None) -> Any:
        """`[..., k]` -> the same, `Rounded` by fp8."""
        if fp8 is not None:
            return fp8.norm(x, self.weight, self.bias, self.eps)
        return recomputable(self.recompute, super().forward, x)


# One kernel forward and two backward; elsewhere autograd takes torch's norm apart into some twenty
# operations, which keep x in fp32 (on a CPU a small model's norms took half as long again).
_FUSED = has_fused_norm()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), by torch's kernel."""
    return nn.functional.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """As `rms_norm`, computed in fp32 and rounded once."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _upcast(x).square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed, to_x, to_weight = x * scale, None, None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = _upcast(grad) * weight
            along = (grad * normed).mean(-1, keepdim=True)
            to_x = grad.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype)
        return to_x, to_weight, None


def _upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype is torch.bfloat16 else x
