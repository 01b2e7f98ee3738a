"""One pass over tokens of several slots: which keys and values each token attends.

`PackedBatch` is a pass over any number of tokens of some slots, one after the other: each slot
attends exactly what it has. `StaticBatch` is a pass over the same number of tokens of every slot,
in shapes that never change: what a CUDA graph needs. Each has the two caches that the decoder
attends: `tokens` (self-attention) and `frames` (cross-attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.engine.cache import KVCache
from inference.engine.slots import Slot
from inference.engine.upload import upload
from inference.hf.decoder_moss_video import attend, attend_few


@dataclass
class Segment:
    """`count` new tokens of a slot in a packed batch. Its frames are in the cache already; its
    tokens are not yet appended to the slot.

    attend_all: tokens that see no frame attend all frames of the slot.
    """

    slot: Slot
    count: int
    attend_all: bool = False


class PackedBatch:
    """Segments side by side: hidden states `[1, N, H]`. `frames` is None if no token sees one."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment]):
        self.tokens = PackedTokens(cache, segments)
        frames = PackedFrames(cache, segments)
        self.frames = frames if frames.any else None


class PackedTokens:
    """`TokenCache` of a packed batch."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment]):
        self.cache, self.segments = cache, segments
        self.counts = [segment.count for segment in segments]
        self.masks = [self._mask(segment) for segment in segments]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[1, heads, N, D]`, `k` and `v` `[1, KV heads, N, D]`."""
        parts = zip(*(x.split(self.counts, dim=2) for x in (q, k, v)), strict=True)
        return _join([self._attend(n, layer, *part) for n, part in enumerate(parts)])

    def _attend(self, n: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slot, count, mask = self.segments[n].slot, self.counts[n], self.masks[n]
        end = slot.length + count
        keys, values = self.cache.tokens_of[layer][:, slot.index]  # [KV heads, max_tokens, D] each
        keys[:, slot.length : end], values[:, slot.length : end] = k[0], v[0]
        causal = count > 1 and mask is None
        return attend(q, keys[None, :, :end], values[None, :, :end], mask, causal)

    def _mask(self, segment: Segment) -> Tensor | None:
        """True where a new token sees a token `[1, 1, count, length + count]`."""
        length, count = segment.slot.length, segment.count
        if count == 1 or length == 0:
            return None
        key = torch.arange(length + count, device=self.cache.device)
        return (key <= key[length:, None])[None, None]


class PackedFrames:
    """`FrameCache` of a packed batch."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment]):
        self.cache, self.segments = cache, segments
        self.counts = [segment.count for segment in segments]
        views = [self._view(segment) for segment in segments]
        self.masks = [mask for mask, _ in views]
        seen = torch.cat([sees for _, sees in views])  # [N]
        self.any = bool(seen.any())
        blind = not bool(seen.all())
        self.sees = upload(seen[None, :, None].to(cache.dtype), cache.device) if blind else None

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """`q` `[1, heads, N, D]`."""
        starts = accumulate(self.counts, initial=0)
        parts = zip(starts, q.split(self.counts, dim=2), strict=False)
        return _join([self._attend(n, layer, start, x) for n, (start, x) in enumerate(parts)])

    def _attend(self, n: int, layer: int, start: int, q: Tensor) -> Tensor:
        segment, mask = self.segments[n], self.masks[n]
        used = segment.slot.ring.used * self.cache.patches
        if used == 0:
            return torch.zeros_like(q)
        keys, values = self.cache.frames_of[layer][:, segment.slot.index]
        out = attend(q, keys[None, :, :used], values[None, :, :used], mask)
        if mask is None or segment.attend_all or self.sees is None:
            return out
        return out * self.sees[:, None, start : start + segment.count]

    def _view(self, segment: Segment) -> tuple[Tensor | None, Tensor]:
        """True where a token sees a vision token `[1, 1, count, used x P]` (None: everywhere), and
        where it sees any `[count]`."""
        slot, ring = segment.slot, segment.slot.ring
        at = torch.arange(slot.position, slot.position + segment.count)[:, None]
        first = torch.tensor(ring.first[: ring.used], dtype=torch.long)
        last = torch.tensor(ring.last[: ring.used], dtype=torch.long)
        seen = (first <= at) & (at < last)  # [count, used]
        sees_any = seen.any(1)
        if bool(seen.all()) and bool(sees_any.all()):
            return None, sees_any
        mask = seen | ~sees_any[:, None]  # a softmax over nothing is NaN
        mask = upload(mask, self.cache.device).repeat_interleave(self.cache.patches, dim=1)
        return mask[None, None], sees_any


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class StaticBatch:
    """`count` new tokens of every slot: hidden states `[slots, count, H]`.

    Args:
        length, position: cached tokens of each slot, and the position of its next one `[slots]`.
    """

    def __init__(self, cache: KVCache, count: int, length: Tensor, position: Tensor):
        new = torch.arange(count, device=cache.device)
        self.positions = position[:, None] + new  # [slots, count]
        self.tokens = StaticTokens(cache, length[:, None] + new)
        self.frames = StaticFrames(cache, self.positions)


class StaticTokens:
    """`TokenCache` of a static batch, whose tokens are written to `places` `[slots, count]`."""

    def __init__(self, cache: KVCache, places: Tensor):
        self.cache, self.places = cache, places
        self.slots = torch.arange(cache.slots, device=cache.device)[:, None]
        key = torch.arange(cache.text.shape[-2], device=cache.device)
        self.mask = (key <= places[..., None])[:, None]  # [slots, 1, count, places]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[slots, heads, count, D]`, `k` and `v` `[slots, KV heads, count, D]`."""
        keys, values = self.cache.tokens_of[layer]
        keys[self.slots, :, self.places] = k.transpose(1, 2)
        values[self.slots, :, self.places] = v.transpose(1, 2)
        return attend_few(q, keys, values, self.mask)


class StaticFrames:
    """`FrameCache` of a static batch, whose tokens are at `positions` `[slots, count]`."""

    def __init__(self, cache: KVCache, positions: Tensor):
        self.cache = cache
        at = positions[..., None]
        seen = (cache.first[:, None] <= at) & (at < cache.last[:, None])  # [slots, count, window+1]
        sees_any = seen.any(-1, keepdim=True)
        self.sees = sees_any.to(cache.dtype)
        # A softmax over nothing is NaN: such tokens attend all, and `sees` drops the result.
        mask = (seen | ~sees_any).repeat_interleave(cache.patches, dim=-1)
        self.mask = F.pad(mask, (0, cache.frames.shape[-2] - mask.shape[-1]))[:, None]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """`q` `[slots, heads, count, D]`."""
        keys, values = self.cache.frames_of[layer]
        return attend_few(q, keys, values, self.mask) * self.sees[:, None]
