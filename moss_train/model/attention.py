"""The attention switch: `model.attention`, whose kinds data_pipeline/attention_kinds.py describes.

The core of a self-attention takes heads and returns heads. Its input is a batch of frames
`[N, L, heads, D]`, in each of which all positions attend each other, or a microbatch's packed text
`[T, heads, D]`, in which each sequence attends itself causally. Optional packages are imported
when they are chosen: Transformer Engine here, flash-attn in data_pipeline/flash.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from data_pipeline import flash
from moss_train.model.packed_text import PackedText
from moss_train.model.sdpa import attend

Core = Callable[..., Tensor]  # (query, key, value, mask or text) -> as query


def attend_whole(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention over a batch; `mask` is added to the scores, like `[N, heads, L, L]`."""
    return attend(query, key, value, mask)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, text: PackedText) -> Tensor:
    """torch's causal attention over packed sequences, padded to batches; KV heads are shared."""
    sizes = [group.tokens for group in text.groups]
    parts = zip(text.groups, *(x.split(sizes) for x in (query, key, value)), strict=True)
    out = []
    for group, *part in parts:
        q, k, v = (group.pad(x) for x in part)  # [B, S, heads, D]
        out.append(group.unpad(attend(q, k, v, causal=True)))
    return out[0] if len(out) == 1 else torch.cat(out)


def attention_core(
    backend: str, config: TransformerConfig, groups: ProcessGroupCollection, number: int, text: bool
) -> Core:
    """The core of layer `number`, for packed text or for a batch of frames.

    Raises:
        ValueError: the package that `backend` needs is not installed.
    """
    if backend == "flash":
        return _flash_packed() if text else _flash_whole()
    if backend == "te":
        return _te(config, groups, number, text)
    return attend_packed if text else attend_whole


def frames_core(backend: str) -> Core | None:
    """The core of a cross-attention, which gets batches as `attend_whole` does: a kind that
    computes those in which all see all, and sdpa the others. None: sdpa computes all.

    Raises:
        ValueError: the package that `backend` needs is not installed.
    """
    if backend != "flash":
        return None
    whole = _flash_whole()

    def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return whole(query, key, value, None) if mask is None else attend(query, key, value, mask)

    return core


def _flash_whole() -> Core:
    whole = _load_flash().whole

    def core(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise ValueError("model.attention=flash takes no mask: use sdpa")
        return whole(query, key, value, False)[0]

    return core


def _flash_packed() -> Core:
    packed = _load_flash().packed

    def core(query: Tensor, key: Tensor, value: Tensor, text: PackedText) -> Tensor:
        return packed(query, key, value, text.bounds, max(text.spans))

    return core


def _te(config: TransformerConfig, groups: ProcessGroupCollection, number: int, text: bool) -> Core:
    kind = AttnMaskType.padding_causal if text else AttnMaskType.no_mask
    attend: nn.Module = _import_te()(
        config=config,
        layer_number=number,
        attn_mask_type=kind,
        attention_type="self",
        pg_collection=groups,
    )

    def whole(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise ValueError("model.attention=te takes no mask: use sdpa")
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # [L, N, heads, D]
        return attend(q, k, v, None, kind).transpose(0, 1).view_as(query)

    def packed(query: Tensor, key: Tensor, value: Tensor, text: PackedText) -> Tensor:
        bounds, longest = text.bounds, max(text.spans)
        # No cu_seqlens_*_padded: there is nothing between sequences.
        layout = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
        out = attend(query, key, value, None, kind, packed_seq_params=layout)
        return out.view_as(query)

    return packed if text else whole


def _load_flash() -> flash.Flash:
    try:
        return flash.load()
    except ImportError as error:
        raise ValueError(
            "model.attention=flash needs the package flash-attn (pip install 'moss-train[flash]')"
            f", which cannot be imported: {error}"
        ) from None


def _import_te() -> type[nn.Module]:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "model.attention=te needs Transformer Engine (pip install 'moss-train[te]')"
            f", which cannot be imported: {error}"
        ) from None
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention
