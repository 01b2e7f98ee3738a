"""Attention in plain torch, by which the stand-in packages compute."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention with all scores, and each row's log-sum-exp.

    Args:
        q: `[B, S, heads, D]`. k, v: `[B, K, KV heads, D]`.
        hidden: True where a query does not see a key, like `[B, heads, S, K]`.

    Returns:
        Like q, 0 where a query sees nothing; `[B, heads, S]`.
    """
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bshd,bkhd->bhsk", q.to(wide), k.to(wide)) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    sums = scores.logsumexp(-1)
    weights = (scores - sums.clamp(min=torch.finfo(wide).min)[..., None]).exp()
    return torch.einsum("bhsk,bkhd->bshd", weights, v.to(wide)).to(q.dtype), sums


def later(queries: int, keys: int, shift: int) -> Tensor:
    """True where key j lies behind query i: j > i + shift `[queries, keys]`."""
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + shift)


def packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: tuple[list[int], list[int]], causal: bool
) -> Tensor:
    """Each sequence alone: q `[T, heads, D]`, k, v `[T, KV heads, D]`; where those of the queries
    and of the keys begin, and their ends. Causal: the last query sees all keys of its sequence."""
    out = []
    spans = (list(pairwise(x)) for x in bounds)
    for (start, stop), (first, last) in zip(*spans, strict=True):
        hidden = later(stop - start, last - first, last - first - stop + start) if causal else None
        own = k[None, first:last], v[None, first:last]
        out.append(attend(q[None, start:stop], *own, scale, hidden)[0][0])
    return torch.cat(out)
