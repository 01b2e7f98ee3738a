"""torch_npu's fused attention in the place of torch's, on Ascend NPUs.

A slot's whole buffer goes in as it lies, with the length that is attended: a slice of it would be
copied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline import npu
from inference.engine.attend import frame_mask
from inference.kernels import npu_attention
from inference.kernels.npu_attention import fused

# Sides of the mask that stands for any causal one, and what says so: query i of S sees the keys up
# to i + length - S.
SIDE, LAST_SEES_ALL = 2048, 3


class NpuAttention:
    """`Attend` by torch_npu."""

    fixed = npu_attention.Attention

    def __init__(self) -> None:
        npu.package()
        self._later: Tensor | None = None  # [SIDE, SIDE]

    def text(self, count: int, length: int, device: torch.device) -> dict[str, Any]:
        if count == 1:
            return {}
        if self._later is None:
            self._later = torch.ones(SIDE, SIDE, dtype=torch.bool, device=device).triu(1)
        return {"atten_mask": self._later, "sparse_mode": LAST_SEES_ALL}

    def frames(
        self, visible: Tensor | None, patches: int, places: int, device: torch.device
    ) -> dict[str, Any]:
        if visible is None:
            return {}
        mask = frame_mask(visible, patches, device)
        return {"atten_mask": ~F.pad(mask, (0, places - mask.shape[-1]))}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, length: int, plan: dict[str, Any]
    ) -> Tensor:
        return fused("BNSD", q, k, v, actual_seq_lengths_kv=[length], **plan)

    def tower(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        hidden = {} if mask is None else {"atten_mask": ~mask}
        return fused("BSND", q, k, v, **hidden)
