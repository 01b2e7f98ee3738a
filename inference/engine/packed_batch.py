"""One pass over any number of tokens of several slots, one after the other: which keys and values
each token attends.

Each slot attends exactly what it has. A `PackedBatch` has the two caches that the decoder attends:
`tokens` (self-attention) and `frames` (cross-attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from inference.engine.attend import Attend
from inference.engine.cache import KVCache
from inference.engine.slots import Slot
from inference.engine.upload import upload
from inference.kernels import plain


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

    def __init__(self, cache: KVCache, segments: Sequence[Segment], attend: Attend):
        self.tokens = PackedTokens(cache, segments, attend)
        frames = PackedFrames(cache, segments, attend)
        self.frames = frames if frames.any else None


class PackedTokens:
    """`TokenCache` of a packed batch."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment], attend: Attend):
        self.cache, self.segments, self.kind = cache, segments, attend
        self.counts = [segment.count for segment in segments]
        self.plans = [
            attend.text(segment.count, segment.slot.length + segment.count, cache.device)
            for segment in segments
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q` `[1, heads, N, D]`, `k` and `v` `[1, KV heads, N, D]`."""
        parts = zip(*(x.split(self.counts, dim=2) for x in (q, k, v)), strict=True)
        return _join([self._attend(n, layer, *part) for n, part in enumerate(parts)])

    def _attend(self, n: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slot = self.segments[n].slot
        end = slot.length + self.counts[n]
        buffers = self.cache.tokens_of[layer][:, slot.index]  # [2, KV heads, max_tokens, D]
        scales = _scales(self.cache, layer)
        for buffer, new, scale in zip(buffers, (k[0], v[0]), scales, strict=True):
            buffer[:, slot.length : end] = plain.kept(new, scale)
        keys, values = _read(buffers, scales, end, q.dtype)
        return self.kind(q, keys, values, end, self.plans[n])


class PackedFrames:
    """`FrameCache` of a packed batch."""

    def __init__(self, cache: KVCache, segments: Sequence[Segment], attend: Attend):
        self.cache, self.segments, self.kind = cache, segments, attend
        self.counts = [segment.count for segment in segments]
        views = [self._view(segment) for segment in segments]
        self.masked = [mask is not None for mask, _ in views]
        places = cache.frames.shape[-2]
        self.plans = [attend.frames(mask, cache.patches, places, cache.device) for mask, _ in views]
        sees_any = torch.cat([sees for _, sees in views])  # [N]
        self.any = bool(sees_any.any())
        some_see_none = not bool(sees_any.all())
        self.sees = (
            upload(sees_any[None, :, None].to(cache.dtype), cache.device) if some_see_none else None
        )

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """`q` `[1, heads, N, D]`."""
        starts = accumulate(self.counts, initial=0)
        parts = zip(starts, q.split(self.counts, dim=2), strict=False)
        return _join([self._attend(n, layer, start, x) for n, (start, x) in enumerate(parts)])

    def _attend(self, n: int, layer: int, start: int, q: Tensor) -> Tensor:
        segment = self.segments[n]
        used = segment.slot.ring.used * self.cache.patches
        if used == 0:
            return torch.zeros_like(q)
        buffers = self.cache.frames_of[layer][:, segment.slot.index]
        keys, values = _read(buffers, _scales(self.cache, layer), used, q.dtype)
        out = self.kind(q, keys, values, used, self.plans[n])
        if not self.masked[n] or segment.attend_all or self.sees is None:
            return out
        return out * self.sees[:, None, start : start + segment.count]

    def _view(self, segment: Segment) -> tuple[Tensor | None, Tensor]:
        """True where a token sees a frame `[count, used]` (None: everywhere), and where it sees any
        `[count]`; one that sees none has all in the first."""
        slot, ring = segment.slot, segment.slot.ring
        at = torch.arange(slot.position, slot.position + segment.count)[:, None]
        first = torch.tensor(ring.first[: ring.used], dtype=torch.long)
        last = torch.tensor(ring.last[: ring.used], dtype=torch.long)
        visible = (first <= at) & (at < last)  # [count, used]
        sees_any = visible.any(1)
        if bool(visible.all()) and bool(sees_any.all()):
            return None, sees_any
        return visible | ~sees_any[:, None], sees_any  # a softmax over nothing is NaN


def _scales(cache: KVCache, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """Scales of a layer's keys and values in 8 bits, `[KV heads, 1, 1]` each; None: they are in the
    model's dtype."""
    scales = cache.scales_of.get(layer)
    return (None, None) if scales is None else (scales[0, :, None, None], scales[1, :, None, None])


def _read(
    buffers: Tensor, scales: Sequence[Tensor | None], length: int, dtype: torch.dtype
) -> list[Tensor]:
    """A slot's keys and values `[1, KV heads, places, D]`; of those in 8 bits, the first `length`
    places."""
    return [
        plain.read(buffer if scale is None else buffer[:, :length], scale, dtype)[None]
        for buffer, scale in zip(buffers, scales, strict=True)
    ]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
