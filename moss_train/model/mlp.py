"""The feed-forward half of a layer: SwiGLU in the decoder, GELU with biases in the tower."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP, MLPSubmodules, apply_swiglu_sharded_factory
from torch import Tensor
from torch.nn.functional import gelu, silu

from data_pipeline.fp8 import Rounded
from moss_train.model.linear import ColumnLinear, RowLinear
from moss_train.model.recompute import recomputable, selective


class FeedForward(MLP):
    """megatron's MLP (parameters, checkpoint form) with a forward pass of fewer steps."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection):
        submodules = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        super().__init__(
            config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=groups.tp
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """megatron's; B of an adapter has the rows of gate and up as the weight does."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        rows = f"{prefix}linear_fc1.lora_b"
        if rows in state:
            state[rows] = apply_swiglu_sharded_factory(state[rows], sharded_offsets)
        return state

    def forward(self, x: Tensor | Rounded) -> Tensor:  # type: ignore[override]
        """`[..., H]` -> `[..., H]`."""
        hidden, bias = self.linear_fc1(x)
        hidden = hidden if bias is None else hidden + bias
        out, bias = self.linear_fc2(self._activation(hidden))
        return out if bias is None else out + bias

    def _activation(self, hidden: Tensor) -> Tensor | Rounded:
        if self.config.gated_linear_unit:
            function = self.config.kernels.swiglu or swiglu
        elif self.linear_fc2.rounds is not None:
            return self.linear_fc2.rounds.gelu(hidden)
        else:
            function = gelu
        return recomputable(selective(self.config), function, hidden)


def swiglu(hidden: Tensor) -> Tensor:
    """`[..., 2 F]`, gate and up -> silu(gate) * up `[..., F]` (Shazeer 2020)."""
    return _SwiGLU.apply(hidden)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only, not silu(gate) beside it, and writes both gradients in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.unflatten(-1, (2, -1)).unbind(-2)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden)
        gate, up = hidden.unflatten(-1, (2, -1)).unbind(-2)
        to_gate, to_up = to_hidden.unflatten(-1, (2, -1)).unbind(-2)
        torch.mul(grad, silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return to_hidden
