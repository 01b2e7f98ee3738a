"""megatron's parallel linear layers, without their detour where a layer is whole; with LoRA.

Split over tensor ranks they run as they are. On one tensor rank megatron still goes through an
autograd function written in Python, which costs more than the product itself in a small model;
torch's own linear computes the same.

An adapted layer adds `scale * B A x` to its output (Hu et al. 2021): A `[rank, in]`, B
`[out, rank]`. The side that the layer splits over tensor ranks is split in them too; between A and
B only `rank` numbers a token travel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn.functional import linear

from data_pipeline.fp8 import Fp8, Rounded
from moss_train.model.fp8 import linear_fp8
from moss_train.model.kernels import LayerConfig
from moss_train.model.recompute import recomputed
from moss_train.model.weight_gradient import MAIN, weight_gradient


class _Adaptable(nn.Module):
    """What both kinds share: the pair of matrices, absent until `adapt`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: Any
    lora_b: Any
    config: LayerConfig
    tp_group: dist.ProcessGroup
    sequence_parallel: bool
    disable_grad_reduce: bool  # of column-parallel layers
    sharded_dimensions: dict[str, int]  # of the parameters, in a checkpoint

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.lora_scale = 0.0

    @property
    def rounds(self) -> Fp8 | None:
        """What may round this layer's input to FP8 where it is made; None: the input is needed as
        it is."""
        whole = self.config.tensor_model_parallel_size == 1 and self.lora_a is None
        return self.config.kernels.fp8 if whole and not torch.is_grad_enabled() else None

    def product(self, x: Tensor | Rounded) -> Tensor:
        """The layer's output on one tensor rank, which holds the whole layer."""
        fp8, add = self.config.kernels.fp8, self.config.kernels.accumulate
        if fp8 is not None:
            return linear_fp8(fp8, x, self.weight, self.bias, add)
        assert isinstance(x, Tensor)
        if add is None or not self.weight.requires_grad or not hasattr(self.weight, MAIN):
            return linear(x, self.weight, self.bias)
        return _Accumulating.apply(x, self.weight, self.bias, add)

    def adapt(self, rank: int, scale: float) -> None:
        """Adds A and B, whose values are still to be set."""
        out, inner = self.weight.shape  # this rank's
        self.lora_a = nn.Parameter(self.weight.detach().new_empty(rank, inner))
        self.lora_b = nn.Parameter(self.weight.detach().new_empty(out, rank))
        self.lora_scale = scale

    def low_rank_update(self) -> Tensor:
        """What A and B add to `weight` (to this rank's part of it), in fp32: to be rounded once."""
        return self.lora_scale * (self.lora_b.float() @ self.lora_a.float())

    def merge(self) -> None:
        """Adds A and B to the weight for good, and drops them."""
        self.weight.data.copy_(self.weight.float() + self.low_rank_update().detach())
        self.lora_a = self.lora_b = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """megatron's checkpoint form."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.sharded_dimensions,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class ColumnLinear(_Adaptable, ColumnParallelLinear):
    """Output features split over tensor ranks. Returns (output, bias that is still to be added)."""

    sharded_dimensions = {"weight": 0, "bias": 0, "lora_b": 0}  # noqa: RUF012

    def adapt(self, rank: int, scale: float) -> None:
        """B is split, A whole on every rank."""
        super().adapt(rank, scale)
        # The gradient of A is a part of a sum where each rank has its own tokens only, and where
        # the caller sums the input's gradient.
        if self.sequence_parallel or self.disable_grad_reduce:
            self.lora_a.partial_over_tensor = True

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with recomputed(input_):
            if self.config.tensor_model_parallel_size > 1:
                out, bias = super().forward(input_, *args, **kwargs)
            else:
                out, bias = self.product(input_), None
            return (out if self.lora_a is None else out + self._low_rank(input_)), bias

    def _low_rank(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.lora_a)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        elif self.tp_group.size() > 1 and not self.disable_grad_reduce:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.lora_scale * linear(hidden, self.lora_b)


class RowLinear(_Adaptable, RowParallelLinear):
    """Input features split over tensor ranks. Returns (output, bias that is still to be added)."""

    sharded_dimensions = {"weight": 1, "lora_a": 1}  # noqa: RUF012

    def adapt(self, rank: int, scale: float) -> None:
        """A is split, B whole on every rank."""
        super().adapt(rank, scale)
        if self.sequence_parallel:
            self.lora_b.partial_over_tensor = True

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        with recomputed(input_):
            if self.config.tensor_model_parallel_size > 1:
                out, bias = super().forward(input_)
            else:
                out, bias = self.product(input_), None
            return (out if self.lora_a is None else out + self._low_rank(input_)), bias

    def _low_rank(self, x: Tensor) -> Tensor:
        hidden = linear(x, self.lora_a)  # of this rank's features: a part of a sum
        if self.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        elif self.tp_group.size() > 1:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return self.lora_scale * linear(hidden, self.lora_b)


class _Accumulating(torch.autograd.Function):
    """A linear layer whose product for the weight's gradient adds it to `main_grad`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: nn.Parameter, bias: Tensor | None, add: Any):
        ctx.save_for_backward(x)
        # Not saved as x is: hooks on that (recompute.py, torch's checkpoint) would give back a copy
        # of the weight, without the attributes that megatron hangs on it.
        ctx.weight, ctx.add = weight, add
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), weight = ctx.saved_tensors, ctx.weight
        to_x, to_bias = None, None
        if ctx.needs_input_grad[0]:
            to_x = grad @ weight
        if ctx.needs_input_grad[2]:
            to_bias = grad.flatten(0, -2).sum(0)
        return to_x, weight_gradient(weight, grad, x, ctx.add), to_bias, None


def unset(weight: Tensor) -> Tensor:
    """Weights are drawn by name later (convert/weights.py), not by the layer."""
    return weight
