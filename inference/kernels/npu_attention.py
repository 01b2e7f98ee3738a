"""torch_npu's fused attention, on Ascend NPUs.

Its masks are True where a key is hidden, and its tensors must be contiguous.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from data_pipeline import npu
from inference.kernels import plain


class Attention(plain.Attention):
    """The operation `attention` of a pass of fixed shape."""

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        queries = q.unflatten(0, (-1, self.rows.count)).transpose(1, 2)  # [B, heads, S, D]
        out = fused("BNSD", queries, keys, values, atten_mask=~mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


def fused(layout: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch_npu.npu_fused_infer_attention_score (for `layout` BNSD: `[B, heads, S, D]`, BSND:
    `[B, S, heads, D]`)."""
    heads = layout.index("N")
    if "atten_mask" in options:
        options["atten_mask"] = options["atten_mask"].contiguous()
    out, _ = npu.package().npu_fused_infer_attention_score(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        num_heads=q.shape[heads],
        num_key_value_heads=k.shape[heads],
        scale=q.shape[-1] ** -0.5,
        input_layout=layout,
        **options,
    )
    return out
