"""torch's attention: which of its kernels a call gets.

Of the kernels of a GPU, MATH keeps every score (a stream of 256 frames: 99.6 GB in place of 55).
torch falls back to it without a word where no other takes the call, and grouped heads
(`enable_gqa`: several query heads share a KV head) are taken

| | cuDNN | flash | efficient |
|---|---|---|---|
| half precision, no mask | yes | yes | no |
| half precision, a mask | yes, not deterministic | no | no |
| fp32 | no | no | no |

where equally many heads are always taken by one that is there. So grouped heads go as such in half
precision without a mask (cuDNN 0.48 ms where folded ones with a mask take 0.58: 128 tokens over 64
frames, an H200, forward and backward). Otherwise the query heads of a KV head are folded into more
query rows, which with a mask is also what cuDNN is quickest at (0.70 ms as they are, 0.58 folded);
a causal call, whose rows must stay where they are, repeats its KV heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from data_pipeline.devices import is_accelerator

SHORT = 128  # positions
HALF = (torch.bfloat16, torch.float16)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention. Many short sequences on a CPU are faster as plain products: torch's fused
    kernel took 2.3 times as long for 112 x 4 heads of 24 positions, forward and backward.

    Args:
        q: `[B, S, heads, D]`. k, v: `[B, K, KV heads, D]`.
        mask: is added to the scores, like q: `[..., folded queries or 1, K]` (`spread`).
        causal: position s attends keys up to s.

    Returns:
        As q.
    """
    if is_accelerator(q) or q.dtype is torch.bfloat16 or q.shape[1] > SHORT:
        return attend_fused(q, k, v, mask, causal)
    shared = q.shape[2] // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = fold(q * q.shape[-1] ** -0.5, shared) @ k.transpose(-1, -2)
    if causal:
        hidden = torch.full((k.shape[2], k.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
        scores = scores + hidden.repeat(shared, 1)
    if mask is not None:
        scores = scores + mask
    return unfold(scores.softmax(-1) @ v, shared)


def attend_fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """As `attend`, by torch's fused kernels for sequences of any length."""
    shared = q.shape[2] // k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    grouped = mask is None and (q.dtype in HALF if is_accelerator(q) else causal)
    if shared > 1 and not (grouped or causal):
        return unfold(scaled_dot_product_attention(fold(q, shared), k, v, attn_mask=mask), shared)
    if shared > 1 and not grouped:
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    out = scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared > 1 and grouped
    )
    return out.transpose(1, 2)


def fold(q: Tensor, shared: int) -> Tensor:
    """The `shared` query heads of a KV head as more queries: `[B, KV heads, shared x S, D]`."""
    return q.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def unfold(x: Tensor, shared: int) -> Tensor:
    """`[B, KV heads, shared x S, D]` -> `[B, S, heads, D]`."""
    return x.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def spread(mask: Tensor, shared: int, keys: int, dtype: torch.dtype) -> Tensor:
    """A mask `[..., S, M]`, whose columns are of `keys` neighbouring keys each, for folded queries
    and all keys, `[..., shared x S, M x keys]`, by one copy; one of all queries alike stays
    `[..., 1, M x keys]`.
    """
    rows, columns = mask.shape[-2:]
    sizes = (shared if rows > 1 else 1, rows, columns, keys)
    mask = mask[..., None, :, :, None].expand(*mask.shape[:-2], *sizes)
    if sizes[0] * sizes[3] > 1:
        mask = mask.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return mask.to(dtype).flatten(-4, -3).flatten(-2)
