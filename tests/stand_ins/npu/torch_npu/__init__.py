"""Stands for torch_npu: npu_fused_infer_attention_score by its page in Ascend's op-plugin (A2, A3;
at 0adf4501), computed in plain torch on any device.

OTHER_DTYPES: also fp32 and fp64 are taken, for tests that compare digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tests.stand_ins import reference

__version__ = "2.13.0"
OTHER_DTYPES = False
calls: list[str] = []
SIDE = 2048


def npu_fused_infer_attention_score(
    query, key, value, *, pse_shift=None, atten_mask=None, actual_seq_lengths=None,
    actual_seq_lengths_kv=None, block_table=None, num_heads=1, scale=1.0, pre_tokens=2147483647,
    next_tokens=2147483647, input_layout="BSH", num_key_value_heads=0, sparse_mode=0,
    inner_precise=0, block_size=0, softmax_lse_flag=False,
):  # fmt: skip
    calls.append(input_layout)
    assert (pse_shift, block_table, actual_seq_lengths) == (None,) * 3, "not in the stand-in"
    _expect(input_layout in ("BNSD", "BSND"), f"input_layout {input_layout}")
    for name, x in (("query", query), ("key", key), ("value", value), ("atten_mask", atten_mask)):
        _expect(x is None or x.is_contiguous(), f"{name} is not contiguous")
    half = query.dtype in (torch.float16, torch.bfloat16)
    _expect(half or OTHER_DTYPES, f"query is {query.dtype}")
    _expect(query.dtype == key.dtype == value.dtype, "dtypes differ")
    _expect(key.shape == value.shape, "key and value differ")
    _expect(type(scale) is float, "scale is no float")
    bnsd = input_layout == "BNSD"
    q, k, v = (x.transpose(1, 2) if bnsd else x for x in (query, key, value))
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    _expect(len(k) == batch and k.shape[3] == width, "key has another shape")
    _expect(heads == num_heads, f"num_heads is {num_heads}, query has {heads}")
    _expect(kv_heads == (num_key_value_heads or num_heads), "num_key_value_heads is not key's")
    _expect(heads % kv_heads == 0 and heads // kv_heads <= 64, "heads per KV head")
    _expect(width <= 512 and (width % 16 == 0 or queries == 1), f"heads of {width}")
    _expect(batch <= 65536 and heads <= 256, "too many")
    lengths = _lengths(actual_seq_lengths_kv, batch, keys)
    hidden = torch.arange(keys)[None, None] >= torch.tensor(lengths)[:, None, None]  # [B, 1, K]
    if queries == 1:  # sparse_mode says nothing then
        sparse_mode = 0
    if sparse_mode == 3:
        _check_triangle(atten_mask)
        shift = [length - queries for length in lengths]
        hidden = hidden | torch.stack([reference.later(queries, keys, by) for by in shift])
    else:
        _expect(sparse_mode == 0, f"sparse_mode {sparse_mode} is not in the stand-in")
        _expect((pre_tokens, next_tokens) == (2147483647,) * 2, "tokens of a band")
        hidden = hidden | _mask(atten_mask, batch, queries, keys)
    hidden = hidden.expand(batch, queries, keys)
    _expect(inner_precise in (2, 3) or not hidden.all(-1).any(), "a query sees nothing")
    out, _ = reference.attend(q, k, v, scale, hidden[:, None])
    return (out.transpose(1, 2) if bnsd else out), torch.zeros(1)


def _lengths(given: Sequence[int] | None, batch: int, keys: int) -> list[int]:
    if given is None:
        return [keys] * batch
    _expect(isinstance(given, (list, tuple)), "actual_seq_lengths_kv is no list of the host's")
    _expect(all(type(n) is int and 0 <= n <= keys for n in given), f"lengths {given}")
    _expect(len(given) == 1 or len(given) >= batch, f"{len(given)} lengths for {batch}")
    return list(given) * batch if len(given) == 1 else list(given[:batch])


def _mask(mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor:
    """True where a key is hidden, to `[B or 1, S, K]`."""
    if mask is None:
        return torch.zeros(1, 1, 1, dtype=torch.bool)
    _expect(mask.dtype in (torch.bool, torch.int8, torch.uint8), f"atten_mask is {mask.dtype}")
    tail = (queries, keys)
    shapes = {tail, *((b, *tail) for b in (1, batch)), *((b, 1, *tail) for b in (1, batch))}
    if queries == 1:
        shapes.add((batch, keys))
    _expect(tuple(mask.shape) in shapes, f"atten_mask {tuple(mask.shape)}, wanted {shapes}")
    return mask.bool().reshape(-1, queries, keys)


def _check_triangle(mask: Tensor | None) -> None:
    shapes = ((SIDE, SIDE), (1, SIDE, SIDE), (1, 1, SIDE, SIDE))
    assert mask is not None
    _expect(tuple(mask.shape) in shapes, "sparse_mode 3 wants 2048 x 2048")
    _expect(torch.equal(mask.bool().view(SIDE, SIDE), _triangle()), "hidden is what lies above")


@cache
def _triangle() -> Tensor:
    return torch.ones(SIDE, SIDE, dtype=torch.bool).triu(1)


def _expect(right: bool, message: str) -> None:
    if not right:
        raise RuntimeError(message)
