"""Stands for flash-attn 4's flash_attn.cute.interface (at 0251105a), on one of Hopper: signatures,
results and refusals of its calls as far as ours go, computed in plain torch on any device.

OTHER_DTYPES: also fp32 and fp64 are taken, for tests that compare digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.stand_ins import reference

OTHER_DTYPES = False
calls: list[str] = []


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
):  # fmt: skip
    calls.append("whole")
    _check_heads(q, k, v)
    keys = k.shape[1]
    assert k.shape == v.shape == (len(q), keys, *k.shape[2:])
    hidden = reference.later(q.shape[1], keys, keys - q.shape[1]) if causal else None
    out, sums = reference.attend(q, k, v, softmax_scale or q.shape[-1] ** -0.5, hidden)
    return out, sums if return_lse else None


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
    softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None,
    mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
    scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
):  # fmt: skip
    calls.append("packed")
    _check_heads(q, k, v)
    for at, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        assert at.dtype == torch.int32, "cu_seqlens_q, cu_seqlens_k must be int32"
        assert at.stride(0) == 1, "cu_seqlens_q, cu_seqlens_k must be contiguous"
        assert at.device == x.device, "inputs must be on CUDA device"
        assert int(at[-1]) == len(x)
    assert cu_seqlens_k.shape == cu_seqlens_q.shape
    bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = reference.packed(q, k, v, softmax_scale or q.shape[-1] ** -0.5, bounds, causal)
    return out, None


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert OTHER_DTYPES or v.dtype in (torch.float16, torch.bfloat16), "inputs must be half"
    assert q.dtype == k.dtype == v.dtype, "q, k, v, and qv must have the same dtype"
    assert q.device == k.device == v.device, "inputs must be on CUDA device"
    assert q.shape[-2] % k.shape[-2] == 0, "num_head must be divisible by num_head_kv"
    assert 8 <= q.shape[-1] <= 256, "head_dim must be between 8 and 256"
    assert q.shape[-1] % 8 == 0, "head_dim must be divisible by 8"
