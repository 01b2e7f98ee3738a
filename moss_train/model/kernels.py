"""Operations of the layers that a GPU has a quicker form of; None: plain torch's.

Which of them a device runs is found out in choose_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from data_pipeline.fp8 import Fp8
from moss_train.model.weight_gradient import Accumulate

Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernels:
    """The kernels that layers use, each with the signature of the plain form.

    swiglu: `[..., 2 F]` -> `[..., F]` (mlp.swiglu).
    rotate: `[N, ..., D]`, cosines and sines `[N, 1, D]` -> as the first (rope.rotate).
    statistics: of each row of logits `[n, V]`, with a column of it or -1 `[n]`: the logarithm of
        the sum of exponentials, the column's logit or 0, the sum; fp32 `[n]` each. Its backward
        pass writes the gradient over the logits.
    accumulate: adds the gradient of a weight, `gradient.T @ x` of bf16 matrices, to an fp32 one, in
        the product (weight_gradient.py).
    fp8: layers of one tensor rank in FP8 (fp8.py): other numbers than the plain ones', where
        `model.fp8` asks for it; on a CPU, too.
    """

    swiglu: Callable[[Tensor], Tensor] | None = None
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    statistics: Statistics | None = None
    accumulate: Accumulate | None = None
    fp8: Fp8 | None = None


@dataclass
class LayerConfig(TransformerConfig):
    """megatron's configuration of a transformer's layers, with the kernels that they use."""

    kernels: Kernels = field(default_factory=Kernels)
