"""Static keys and values of all slots, and the two ways in which a pass attends them.

Self-attention: for each slot a row of `max_tokens`, in order of arrival. Cross-attention: a ring
of `window` frames and one place more (see slots.FrameRing); where a frame lies does not matter,
for its position is in its keys. Keys and values are kept once per KV head.

`PackedBatch` is a pass over any number of tokens of some slots, one after the other: each slot
attends exactly what it has. `StaticBatch` is a pass over the same number of tokens of every slot,
in shapes that never change: what a CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.engine.slots import NEVER, Eviction, Slot
from inference.hf.decoder_moss_video import Decoder, Rotation, attend, attend_few

# Places behind `max_tokens`: an idle slot of a static batch writes its keys and values there (2
# tokens at most; 8 keep the mask's rows aligned for CUDA).
SPARE = 8


class KVCache:
    """Buffers, and what writes frames into them.

    Args:
        decoder: whose layers they serve. Its weights say how many KV heads this rank has.
        slots: sessions at once.
        max_tokens: tokens of a slot.
        window: frames of a slot.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        max_tokens: int,
        window: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        text = decoder.config.text_config
        self.decoder, self.slots, self.max_tokens = decoder, slots, max_tokens
        self.window, self.device, self.dtype = window, device, dtype
        self.patches = decoder.config.tokens_per_frame  # vision tokens of a frame
        self.own = [i for i in range(text.num_hidden_layers) if i not in decoder.cross]
        head_dim = text.hidden_size // text.num_attention_heads
        kv_heads = decoder.cross_attention(decoder.cross[0]).k_proj.weight.shape[0] // head_dim

        def buffer(layers: int, length: int) -> Tensor:
            # Zeros: what a mask hides must still be a number.
            shape = (layers, 2, slots, kv_heads, length, head_dim)
            return torch.zeros(shape, device=device, dtype=dtype)

        self.text = buffer(len(self.own), max_tokens + SPARE)
        self.frames = buffer(len(decoder.cross), (window + 1) * self.patches)
        self.tokens_of = {layer: self.text[n] for n, layer in enumerate(self.own)}
        self.frames_of = {layer: self.frames[n] for n, layer in enumerate(decoder.cross)}
        # Positions between which a frame is seen, for static batches.
        self.first = torch.full((slots, window + 1), NEVER, device=device)
        self.last = torch.full((slots, window + 1), NEVER, device=device)
        self._projection = _fuse(decoder)

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(x.numel() * x.element_size() for x in (self.text, self.frames))

    def reset(self, slot: Slot) -> None:
        """Forgets a slot's frames; its tokens are overwritten."""
        self.first[slot.index], self.last[slot.index] = NEVER, NEVER

    def write_frames(self, slot: Slot, place: int, states: Tensor, rotation: Rotation) -> None:
        """Keys and values of states `[n x P, H]` into the slot's ring, from `place` on."""
        projected = F.linear(states, self._projection)[None]
        span = slice(place * self.patches, place * self.patches + len(states))
        parts = projected.chunk(2 * len(self.decoder.cross), dim=-1)
        for n, layer in enumerate(self.decoder.cross):
            keys = self.decoder.cross_attention(layer).rotate_keys(parts[2 * n], rotation)
            values = parts[2 * n + 1].unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
            self.frames_of[layer][0, slot.index, :, span] = keys[0]
            self.frames_of[layer][1, slot.index, :, span] = values[0]
        self._show(slot)

    def commit_eviction(self, slot: Slot) -> None:
        """After the pass that brought it, a frame takes the place of the one that it replaces."""
        victim = slot.ring.commit_eviction()
        if victim is None:
            return
        size, slot_kv = self.patches, self.frames[:, :, slot.index]
        slot_kv[..., victim * size : (victim + 1) * size, :] = slot_kv[..., self.window * size :, :]
        self._show(slot)

    def _show(self, slot: Slot) -> None:
        self.first[slot.index] = torch.tensor(slot.ring.first)
        self.last[slot.index] = torch.tensor(slot.ring.last)

    def compact(self, slot: Slot, indices: list[int]) -> None:
        """Keeps a slot's tokens at these indices, moved together."""
        slot_kv = self.text[:, :, slot.index]  # [layers, 2, KV heads, max_tokens, D]
        where = torch.tensor(indices, device=self.device)
        for n in range(
            len(slot_kv)
        ):  # a layer at a time: a copy of all would be as large as the slot
            slot_kv[n, ..., : len(indices), :] = slot_kv[n].index_select(-2, where)

    def save(self, slot: Slot) -> dict[str, Tensor]:
        """What a slot has, on the CPU."""
        used = slot.ring.used * self.patches
        return {
            "text": self.text[:, :, slot.index, :, : slot.length].cpu().clone(),
            "frames": self.frames[:, :, slot.index, :, :used].cpu().clone(),
        }

    def restore(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Takes back what `save` gave."""
        for name, buffer in (("text", self.text), ("frames", self.frames)):
            saved = state[name]
            buffer[:, :, slot.index, :, : saved.shape[-2]] = saved.to(self.device, self.dtype)
        self._show(slot)


def put_frames(cache: KVCache, slot: Slot, tokens: Sequence[int], frames: Sequence[Tensor]) -> None:
    """Writes keys and values of new frames into a slot's ring, for all cross-attention layers.

    What has to go for them is appended to `slot.evictions`.

    Args:
        tokens: the slot's next ones, with one `<|image|>` for each frame.
        frames: features `[P, H]` each; no more than the ring has room for (`FrameRing.room`).
    """
    image = cache.decoder.config.image_token_index
    positions = [slot.position + i for i, token in enumerate(tokens) if token == image]
    states = torch.stack(tuple(frames)).to(cache.device, cache.dtype)  # [n, P, H]
    each = torch.tensor(positions, device=cache.device)
    each = each.repeat_interleave(cache.patches)[None]  # [1, n x P]
    rotation = cache.decoder.rotation(each, cache.dtype)
    places, replaced = zip(*(slot.ring.put(p) for p in positions), strict=True)
    cache.write_frames(slot, places[0], states.flatten(0, 1), rotation)
    gone = tuple(position for position in replaced if position is not None)
    if gone:
        slot.evictions.append(Eviction("frame", gone))


def _fuse(decoder: Decoder) -> Tensor:
    """Weights of the key and value projections of all cross-attention layers, one under the other;
    the layers' own become views of it."""
    linears = [
        linear
        for layer in decoder.cross
        for attention in (decoder.cross_attention(layer),)
        for linear in (attention.k_proj, attention.v_proj)
    ]
    fused = torch.cat([linear.weight.detach() for linear in linears])
    for linear, weight in zip(linears, fused.chunk(len(linears)), strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return fused


@dataclass
class Segment:
    """`count` new tokens of a slot in a packed batch."""

    slot: Slot
    count: int
    blind_attend: bool = False  # tokens that see no frame attend all that the slot has


class PackedBatch:
    """The caches that the decoder attends in a pass over segments side by side `[1, N, H]`.

    Made before the tokens are counted in (`Slot.append`), after their frames are.
    """

    def __init__(self, cache: KVCache, segments: list[Segment]):
        self.cache, self.segments = cache, segments
        self.counts = [segment.count for segment in segments]
        self.masks = [self._token_mask(segment) for segment in segments]
        views = [self._view(segment) for segment in segments]
        self.frame_masks = [mask for mask, _ in views]
        sees = torch.cat([seen for _, seen in views])
        self.any_frames = bool(sees.any())
        self.sees = None if bool(sees.all()) else sees[None, :, None].to(cache.device, cache.dtype)

    def attend(self, layer: int, q: Tensor, *new: Tensor) -> Tensor:
        """`TokenCache.attend` with the new keys and values, `FrameCache.attend` without."""
        attend_one = self._attend_tokens if new else self._attend_frames
        parts = zip(*(x.split(self.counts, dim=2) for x in (q, *new)), strict=True)
        out = [attend_one(n, layer, *part) for n, part in enumerate(parts)]
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _attend_tokens(self, n: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slot, count = self.segments[n].slot, self.counts[n]
        slot_kv, end = self.cache.tokens_of[layer][:, slot.index], slot.length + count
        slot_kv[0, :, slot.length : end], slot_kv[1, :, slot.length : end] = k[0], v[0]
        keys, values = slot_kv[:, None, :, :end]  # [1, KV heads, end, D] each
        causal = count > 1 and self.masks[n] is None
        return attend(q, keys, values, self.masks[n], causal)

    def _attend_frames(self, n: int, layer: int, q: Tensor) -> Tensor:
        segment = self.segments[n]
        used = segment.slot.ring.used * self.cache.patches
        if used == 0:
            return torch.zeros_like(q)
        slot_kv = self.cache.frames_of[layer][:, segment.slot.index]
        keys, values = slot_kv[:, None, :, :used]
        mask = self.frame_masks[n]
        out = attend(q, keys, values, mask)
        if mask is None or segment.blind_attend or self.sees is None:
            return out
        start = sum(self.counts[:n])
        return out * self.sees[:, None, start : start + segment.count]

    def _token_mask(self, segment: Segment) -> Tensor | None:
        """True where a new token sees a token `[1, 1, count, length + count]`."""
        length, count = segment.slot.length, segment.count
        if count == 1 or length == 0:
            return None
        key = torch.arange(length + count, device=self.cache.device)
        return (key <= key[length:, None])[None, None]

    def _view(self, segment: Segment) -> tuple[Tensor | None, Tensor]:
        """True where a token sees a vision token `[1, 1, count, used x P]` (None: everywhere), and
        where it sees any `[count]`."""
        slot, ring = segment.slot, segment.slot.ring
        at = torch.arange(slot.position, slot.position + segment.count)[:, None]
        first = torch.tensor(ring.first[: ring.used], dtype=torch.long)
        last = torch.tensor(ring.last[: ring.used], dtype=torch.long)
        seen = (first <= at) & (at < last)  # [count, used]
        any_seen = seen.any(1)
        seen = seen | ~any_seen[:, None]  # a softmax over nothing is NaN
        if bool(seen.all()) and bool(any_seen.all()):
            return None, any_seen
        mask = seen.to(self.cache.device).repeat_interleave(self.cache.patches, dim=1)
        return mask[None, None], any_seen


class StaticBatch:
    """The caches that the decoder attends in a pass over `count` tokens of every slot
    `[slots, count, H]`.

    Args:
        length, position: cached tokens of each slot, and the position of its next one `[slots]`.
    """

    def __init__(self, cache: KVCache, count: int, length: Tensor, position: Tensor):
        self.cache = cache
        new = torch.arange(count, device=cache.device)
        self.places = length[:, None] + new  # [slots, count]
        self.slot_index = torch.arange(cache.slots, device=cache.device)[:, None]
        key = torch.arange(cache.max_tokens + SPARE, device=cache.device)
        self.mask = (key <= self.places[..., None])[
            :, None
        ]  # [slots, 1, count, max_tokens + SPARE]
        self.positions = position[:, None] + new
        at = self.positions[..., None]
        seen = (cache.first[:, None] <= at) & (at < cache.last[:, None])  # [slots, count, window+1]
        any_seen = seen.any(-1, keepdim=True)
        self.sees = any_seen.to(cache.dtype)
        self.frame_mask = (seen | ~any_seen).repeat_interleave(cache.patches, dim=-1)[:, None]

    def attend(self, layer: int, q: Tensor, *new: Tensor) -> Tensor:
        """As `PackedBatch.attend`."""
        if not new:
            keys, values = self.cache.frames_of[layer]
            return attend_few(q, keys, values, self.frame_mask) * self.sees[:, None]
        keys, values = self.cache.tokens_of[layer]
        for buffer, x in ((keys, new[0]), (values, new[1])):
            buffer[self.slot_index, :, self.places] = x.transpose(1, 2)
        return attend_few(q, keys, values, self.mask)
