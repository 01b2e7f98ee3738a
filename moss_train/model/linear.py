"""megatron's parallel linear layers, without their detour where a layer is whole.

Split over tensor ranks they run as they are. On one tensor rank megatron still goes through an
autograd function written in Python, which costs more than the product itself in a small model;
torch's own linear computes the same.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.nn.functional import linear


class ColumnLinear(ColumnParallelLinear):
    """Output features split over tensor ranks. Returns (output, bias that is still to be added)."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size > 1:
            return super().forward(input_, *args, **kwargs)
        return linear(input_, self.weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Input features split over tensor ranks. Returns (output, bias that is still to be added)."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.tensor_model_parallel_size > 1:
            return super().forward(input_)
        return linear(input_, self.weight, self.bias), None


def unset(weight: Tensor) -> Tensor:
    """Weights are drawn by name later (convert/weights.py), not by the layer."""
    return weight
