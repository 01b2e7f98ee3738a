"""The attention switch: `model.attention` = sdpa | flash | te | flex.

Each class has the interface of megatron's core attention: `[S, B, heads, D]` in,
`[S, B, heads x D]` out. Optional packages are imported when they are chosen, nowhere else.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = ("sdpa", "flash", "te", "flex")


class SDPAttention(nn.Module):
    """torch's scaled_dot_product_attention; KV heads are shared, not repeated."""

    def __init__(self, attn_mask_type: AttnMaskType, **_: Any):
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """`attention_mask`: None, or True where a query may see a key, `[B, 1, S, S]`."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, D]
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=self.causal, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)  # [S, B, heads * D]


class FlashAttention(nn.Module):
    """The flash-attn package."""

    def __init__(self, attn_mask_type: AttnMaskType, **_: Any):
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.function = _flash_attn_function()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """As SDPAttention, without a mask."""
        if attention_mask is not None:
            raise ValueError("model.attention=flash takes no mask: use sdpa")
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [B, S, heads, D]
        return self.function(q, k, v, causal=self.causal).transpose(0, 1).flatten(2)


def core_attention(backend: str) -> type[nn.Module]:
    """The class that megatron's SelfAttention is built with.

    Raises:
        ValueError: the package that `backend` needs is not installed.
    """
    if backend == "flash":
        _flash_attn_function()
        return FlashAttention
    if backend == "te":
        return _te_attention()
    return SDPAttention


def _flash_attn_function() -> Any:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ValueError(
            "model.attention=flash needs the package flash-attn (pip install 'moss-train[flash]')"
            f", which cannot be imported: {error}"
        ) from None
    return flash_attn_func


def _te_attention() -> type[nn.Module]:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "model.attention=te needs Transformer Engine (pip install 'moss-train[te]')"
            f", which cannot be imported: {error}"
        ) from None
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention
