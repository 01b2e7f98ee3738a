"""Runs the same model the way the published code runs it (transformers 4.46.3), to compare with.

The numbers are the same as modeling_moss_video.py's. What differs: keys and values are repeated to
all heads (those of frames before they are cached), the mask of frames is made anew for the whole
text at each token, patches are pooled after all states are joined, all frames are one batch, and
the cache is transformers' DynamicCache, which copies itself for each token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.hf.attended_moss_video import CachedTokens, NewFrames
from inference.hf.decoder_moss_video import Rotation
from inference.hf.model_moss_video import MossVideoModel
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.hf.vision_moss_video import pool_grid


class RepeatedTokens(CachedTokens):
    """Repeats all cached keys and values to all heads at each token."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        causal = self.mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=causal)


class RepeatedFrames:
    """Keys and values of frames that are repeated to all heads, and an additive mask."""

    def __init__(self, keys_values: dict[int, tuple[Tensor, Tensor]], mask: Tensor, sees: Tensor):
        self.keys_values, self.mask, self.sees = keys_values, mask, sees

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = self.keys_values[layer]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)


class PublishedModel(MossVideoForConditionalGeneration):
    """Takes over another model's parameters; `generate` is transformers' own."""

    def __init__(self, other: MossVideoForConditionalGeneration):
        with torch.device("meta"):
            super().__init__(other.config)
        self.model, self.lm_head = PublishedBackbone(other.model), other.lm_head
        self.generation_config = other.generation_config


class PublishedBackbone(MossVideoModel):
    """Takes over another model's parameters."""

    tokens_type = RepeatedTokens

    def __init__(self, other: MossVideoModel):
        with torch.device("meta"):
            super().__init__(other.config)
        for name, module in other.named_children():
            setattr(self, name, module)

    def _frames(
        self,
        x: Tensor,
        states: Tensor | None,
        new: NewFrames | None,
        mask: Tensor | None,
        cache: Any,
    ) -> Any:
        if new is not None:
            cache.whole_mask = new.seen.long()  # [B, S, F, T]
        elif getattr(cache, "whole_mask", None) is None:
            return None
        else:
            cache.whole_mask = torch.cat((cache.whole_mask, cache.whole_mask[:, -1:]), dim=1)
        tokens = self.config.tokens_per_frame
        # The whole text's mask at each step, of which the last tokens' are taken.
        hidden = 1.0 - cache.whole_mask.repeat_interleave(tokens, dim=3).flatten(2)[:, None]
        lowest = torch.finfo(x.dtype).min
        hidden = hidden.to(x.dtype)
        hidden = hidden.masked_fill(hidden.to(torch.bool), lowest)
        sees = (hidden != lowest).any(dim=-1).to(x.dtype)[..., None]
        hidden = hidden * sees
        last = slice(-x.shape[1], None)
        keys_values = self._keys_values(states, new, cache)
        return RepeatedFrames(keys_values, hidden[:, :, last], sees[:, 0, last])

    def _project(self, layer: int, states: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        k, v = super()._project(layer, states, rotation)
        groups = self.config.text_config.num_attention_heads // k.shape[1]
        return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    def get_image_features(
        self,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor | None = None,
        aspect_ratio_mask: Tensor | None = None,
    ) -> Tensor:
        """All frames in one batch; patches are pooled after all states are joined."""
        batch, frames = pixel_values.shape[:2]
        ones = torch.ones(batch * frames, dtype=torch.long, device=pixel_values.device)
        states = self.vision_model(pixel_values.flatten(0, 1), ones, ones[:, None].bool())
        joined = torch.cat((states[0], torch.stack(states[1:], -1).flatten(-2)), -1)
        config = self.config
        joined = pool_grid(joined, config.pool_mode, config.pool_stride, self.patch_merger)
        return self.multi_modal_projector(joined).flatten(1, 2).unflatten(0, (batch, frames))
