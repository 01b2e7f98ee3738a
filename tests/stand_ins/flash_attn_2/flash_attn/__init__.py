"""Stands for flash-attn 2.8: signatures, documented semantics and refusals of its
flash_attn_interface.py and flash_api.cpp (at 0251105a), computed in plain torch on any device.

OTHER_DTYPES: also fp32 and fp64 are taken, for tests that compare digits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.stand_ins import reference

__version__ = "2.8.4"
OTHER_DTYPES = False
calls: list[str] = []


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    calls.append("whole")
    _refuse_options(dropout_p, window_size, softcap, alibi_slopes, deterministic)
    scale = softmax_scale or q.shape[-1] ** -0.5
    (q, k, v), size = _padded(q, k, v)
    batch, queries, _, width = _check_heads(q, k, v, 4)
    keys, kv_heads = k.shape[1:3]
    _expect(batch > 0, "batch size must be positive")
    _expect(k.shape == v.shape == (batch, keys, kv_heads, width), "k must have shape")
    hidden = reference.later(queries, keys, keys - queries) if causal else None
    out, sums = reference.attend(q, k, v, scale, hidden)
    out = out[..., :size]
    return (out, sums.detach(), q.new_empty(0)) if return_attn_probs else out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    calls.append("packed")
    _refuse_options(dropout_p, window_size, softcap, alibi_slopes, deterministic)
    assert block_table is None, "the stand-in has no paged cache"
    assert not return_attn_probs, "the stand-in does not return them here"
    scale = softmax_scale or q.shape[-1] ** -0.5
    (q, k, v), size = _padded(q, k, v)
    _check_heads(q, k, v, 3)
    _expect(k.shape == v.shape, "v must have shape")
    bounds = []
    for name, longest, x, at in (
        ("cu_seqlens_q", max_seqlen_q, q, cu_seqlens_q),
        ("cu_seqlens_k", max_seqlen_k, k, cu_seqlens_k),
    ):
        _expect(at.dtype is torch.int32, f"{name} must have dtype int32")
        _expect(at.device == x.device, f"{name} must be on CUDA")
        _expect(at.is_contiguous(), f"{name} must be contiguous")
        # What the kernels take on trust.
        _expect(int(at[0]) == 0 and int(at[-1]) == len(x), f"{name} does not span the tokens")
        _expect(type(longest) is int, f"max_seqlen of {name} must be int")
        _expect(int(at.diff().max()) <= longest, f"max_seqlen of {name} is too small")
        bounds.append(at.tolist())
    _expect(len(bounds[0]) == len(bounds[1]), "cu_seqlens_k must have shape")
    return reference.packed(q, k, v, scale, tuple(bounds), causal)[..., :size]


def _padded(*heads: Tensor) -> tuple[list[Tensor], int]:
    """As its Python does before the kernel: heads of a multiple of 8."""
    size = heads[0].shape[-1]
    return [pad(x, (0, -size % 8)) for x in heads], size


def _check_heads(q: Tensor, k: Tensor, v: Tensor, dimensions: int) -> torch.Size:
    half = (torch.float16, torch.bfloat16)
    _expect(q.dtype in half or OTHER_DTYPES, "FlashAttention only support fp16 and bf16 data type")
    _expect(k.dtype == q.dtype, "query and key must have the same dtype")
    _expect(v.dtype == q.dtype, "query and value must have the same dtype")
    _expect(q.device == k.device == v.device, "k must be on CUDA")
    _expect(q.dim() == k.dim() == v.dim() == dimensions, f"q must have {dimensions} dimensions")
    _expect(q.shape[-1] == k.shape[-1], "k must have shape")
    _expect(q.shape[-1] <= 256, "FlashAttention forward only supports head dimension at most 256")
    _expect(
        q.shape[-2] % k.shape[-2] == 0,
        "Number of heads in key/value must divide number of heads in query",
    )
    return q.shape


def _refuse_options(dropout, window, softcap, slopes, deterministic) -> None:
    assert (dropout, window, softcap, slopes) == (0.0, (-1, -1), 0.0, None), "not in the stand-in"
    # What a deterministic run must ask for: its backward pass adds in any order else.
    _expect(
        deterministic or not torch.are_deterministic_algorithms_enabled(),
        "a deterministic run needs deterministic=True",
    )


def _expect(right: bool, message: str) -> None:
    if not right:
        raise RuntimeError(message)
