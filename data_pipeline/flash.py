"""flash-attn, whichever is installed: 2 (`flash_attn`), or 4 alone (`flash_attn.cute`), which
share a folder and differ in names and results. Only here either of them is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flash:
    """The two calls of flash-attn. Query heads that share a KV head are taken as such; a causal
    query of the last row sees all keys, those above one less each.

    whole: `[B, S, heads, D]`, keys and values `[B, K, KV heads, D]`, causal -> like the query, and
        the logarithm of each row's sum of exponentials, fp32 `[B, heads, S]`, which has no
        gradient.
    packed: `[T, heads, D]`, keys and values `[T, KV heads, D]`, where sequences begin, and T, int32
        on the device, and tokens of the longest -> like the query; causal.
    """

    whole: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    packed: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def load() -> Flash:
    """The installed release's.

    Raises:
        ImportError: there is none, or it cannot be imported.
    """
    import flash_attn

    if hasattr(flash_attn, "flash_attn_func"):
        return _release_2(flash_attn)
    from flash_attn.cute import interface

    return _release_4(interface)


def has_release_4() -> bool:
    """Whether release 4 is there, alone or beside 2, by which torch can compute FlexAttention."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:  # no release at all, or one that cannot be imported
        return False


def _release_2(package: Any) -> Flash:
    def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, sums, _ = package.flash_attn_func(
            q, k, v, causal=causal, deterministic=_deterministic(), return_attn_probs=True
        )
        return out, sums

    def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        return package.flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, causal=True, deterministic=_deterministic()
        )

    return Flash(whole, packed)


def _release_4(interface: Any) -> Flash:
    def whole(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, sums = interface.flash_attn_func(
            q, k, v, causal=causal, deterministic=_deterministic(), return_lse=True
        )
        return out, sums.detach()

    def packed(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        out, _ = interface.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=True, deterministic=_deterministic(),
        )  # fmt: skip
        return out

    return Flash(whole, packed)


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()
