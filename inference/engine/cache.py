"""Keys and values of all slots, in buffers of fixed size on the device.

Self-attention: `max_tokens` of each slot, in the order of arrival. Cross-attention: a ring of
`window` frames and one place more (slots.FrameRing says which place holds which frame). A frame
may lie anywhere in the ring: its position is in its keys. Keys and values are kept once per KV
head. How a pass attends them is in packed_batch.py (any number of tokens) and inference/kernels
(passes of fixed shape).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.engine import kv_scales
from inference.engine.cache_sizes import CacheSizes
from inference.engine.slots import NEVER, Eviction, Slot, tokens_to_keep
from inference.engine.upload import upload
from inference.hf.decoder_moss_video import CrossLayer, Decoder, Rotation, SelfLayer, rotate
from inference.kernels import plain


class KVCache:
    """The buffers, and what moves frames and tokens in them.

    Args:
        decoder: whose layers they serve.
        sizes: of a slot (`sizes_of_slot`).
        slots: sessions at once.
        eight_bit: keys and values are in e4m3, a byte each; then `scale_frames` must be called
            before a frame is written.
    """

    def __init__(
        self,
        decoder: Decoder,
        sizes: CacheSizes,
        *,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        eight_bit: bool = False,
    ):
        self.decoder, self.sizes, self.slots = decoder, sizes, slots
        self.max_tokens, self.window, self.patches = sizes.max_tokens, sizes.window, sizes.patches
        self.device, self.dtype = device, dtype
        layers = range(decoder.config.text_config.num_hidden_layers)
        self.own = [layer for layer in layers if layer not in decoder.cross]
        stored = plain.EIGHT_BITS if eight_bit else dtype
        kv_heads, head_dim = sizes.kv_heads, sizes.head_dim

        def buffer(layers: int, length: int) -> Tensor:
            # Zeros: what a mask hides must still be a number.
            shape = (layers, 2, slots, kv_heads, length, head_dim)
            return torch.zeros(shape, device=device, dtype=stored)

        self.text = buffer(sizes.own, sizes.text_length)
        self.frames = buffer(sizes.cross, sizes.frames_length)
        self.tokens_of = {layer: self.text[n] for n, layer in enumerate(self.own)}
        self.frames_of = {layer: self.frames[n] for n, layer in enumerate(decoder.cross)}
        self.scales_of: dict[int, Tensor] = {}
        self._frame_scales: Tensor | None = None  # [layers, 2, KV heads, 1, 1]
        if eight_bit:
            for layer in self.own:
                module = cast(SelfLayer, decoder.layers[layer])
                self.scales_of[layer] = kv_scales.of_text(module, head_dim)
        # Positions between which a frame is seen, for static batches.
        self.views = torch.full((2, slots, self.window + 1), NEVER, device=device)
        self.first, self.last = self.views
        self._projection = _fuse(frame_projections(decoder))
        first = decoder.cross_attention(decoder.cross[0])
        self._rotates, self._eps = first.rope, first.k_norm.eps
        norms = [decoder.cross_attention(layer).k_norm.weight.detach() for layer in decoder.cross]
        self._k_norms = torch.stack(norms)[:, None, None]  # [layers, 1, 1, D]

    def reset(self, slot: Slot) -> None:
        """Forgets a slot's frames; its tokens are overwritten."""
        self.views[:, slot.index] = NEVER

    def clear(self, slot: Slot) -> None:
        """Zeros in place of keys and values that may be NaN: a mask would not hide them from the
        slot's next session, for 0 x NaN is NaN."""
        self.text[:, :, slot.index] = 0
        self.frames[:, :, slot.index] = 0

    def write_frames(self, slot: Slot, place: int, states: Tensor, rotation: Rotation) -> None:
        """Keys and values of states `[n x P, H]` into the slot's ring, from `place` on."""
        ring = self.frames[:, :, slot.index]  # [layers, 2, KV heads, L, D]
        keys, values = self._project(states).unbind(1)
        keys = rotate(keys, rotation) if self._rotates else keys
        span = slice(place * self.patches, place * self.patches + len(states))
        for side, new in enumerate((plain.norm(keys, self._k_norms, self._eps), values)):
            scales = None if self._frame_scales is None else self._frame_scales[:, side]
            ring[:, side, :, span] = plain.kept(new, scales)
        self.write_views(slot)

    def _project(self, states: Tensor) -> Tensor:
        """Projects states `[n, H]` to keys, neither rotated nor normed, and values of all
        cross-attention layers: `[layers, 2, KV heads, n, D]`."""
        layers, _, _, heads, _, width = self.frames.shape
        projected = F.linear(states, self._projection).view(-1, layers, 2, heads, width)
        return projected.permute(1, 2, 3, 0, 4)

    def scale_frames(self, noise: Tensor) -> None:
        """Chooses the scales of frames by the states `[n, H]` of a picture of noise."""
        layers = [cast(CrossLayer, self.decoder.layers[n]) for n in self.decoder.cross]
        scales = kv_scales.of_frames(layers, self._project(noise)[:, 1])
        self.scales_of |= dict(zip(self.decoder.cross, scales, strict=True))
        self._frame_scales = scales[..., None, None]

    def commit_eviction(self, slot: Slot) -> None:
        """Moves a frame that has arrived in a full ring to the place of the one it replaces; to be
        called after its pass."""
        victim = slot.ring.commit_eviction()
        if victim is None:
            return
        size, slot_kv = self.patches, self.frames[:, :, slot.index]
        slot_kv[..., victim * size : (victim + 1) * size, :] = slot_kv[
            ..., self.window * size : (self.window + 1) * size, :
        ]
        self.write_views(slot)

    def write_views(self, slot: Slot) -> None:
        """What static batches read of a slot's ring."""
        self.views[:, slot.index] = upload([slot.ring.first, slot.ring.last], self.device)

    def compact(self, slot: Slot, indices: list[int]) -> None:
        """Keeps a slot's tokens at these indices and moves them together."""
        slot_kv = self.text[:, :, slot.index]  # [layers, 2, KV heads, max_tokens, D]
        where = upload(indices, self.device)
        for n in range(
            len(slot_kv)
        ):  # a layer at a time: a copy of all would be as large as the slot
            slot_kv[n, ..., : len(indices), :] = slot_kv[n].index_select(-2, where)

    def save(self, slot: Slot) -> dict[str, Tensor]:
        """A slot's keys and values, on the CPU, in the model's dtype."""
        lengths = {"text": slot.length, "frames": slot.ring.used * self.patches}
        return {
            name: plain.read(buffer[:, :, slot.index, :, : lengths[name]], scale, self.dtype)
            .cpu()
            .clone()
            for name, buffer, scale in self._buffers()
        }

    def restore(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Writes back what `save` returned."""
        for name, buffer, scale in self._buffers():
            saved = plain.kept(state[name].to(self.device, self.dtype), scale)
            buffer[:, :, slot.index, :, : saved.shape[-2]] = saved
        self.write_views(slot)

    def _buffers(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Each buffer with its name in a saved session, and its scales `[layers, 2, KV heads, 1,
        1]`."""
        own = [self.scales_of[layer] for layer in self.own] if self.scales_of else []
        yield "text", self.text, torch.stack(own)[..., None, None] if own else None
        yield "frames", self.frames, self._frame_scales


def sizes_of_slot(
    decoder: Decoder, *, max_tokens: int, window: int, dtype: torch.dtype, eight_bit: bool
) -> CacheSizes:
    """Sizes of a slot's caches, from a decoder's weights, which say how many KV heads this rank
    has."""
    text = decoder.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    keys = decoder.cross_attention(decoder.cross[0]).k_proj.weight
    return CacheSizes(
        own=text.num_hidden_layers - len(decoder.cross),
        cross=len(decoder.cross),
        kv_heads=keys.shape[0] // head_dim,
        head_dim=head_dim,
        max_tokens=max_tokens,
        window=window,
        patches=decoder.config.tokens_per_frame,
        item=(plain.EIGHT_BITS if eight_bit else dtype).itemsize,
    )


def make_room(
    cache: KVCache, slot: Slot, count: int, special: tuple[int | None, int, int | None]
) -> None:
    """Drops old text of a slot that would grow by `count` tokens beyond `max_tokens`.

    special: silence, `<|image|>` and the end of a turn.
    """
    over = slot.length + count - cache.max_tokens
    if over <= 0:
        return
    # More than needed, because the kept tokens are moved, which costs time at each drop.
    drop = min(max(over, cache.max_tokens // 16), slot.length - 1)
    indices = tokens_to_keep(slot.tokens, drop, *special)
    cache.compact(slot, indices)
    slot.keep(indices)


def put_frames(cache: KVCache, slot: Slot, tokens: Sequence[int], frames: Sequence[Tensor]) -> None:
    """Writes keys and values of new frames into a slot's ring, for all cross-attention layers.

    The frames that they replace are appended to `slot.evictions`.

    Args:
        tokens: the slot's next ones, with one `<|image|>` for each frame.
        frames: features `[P, H]` each; no more than the ring has room for (`FrameRing.room`).
    """
    image = cache.decoder.config.image_token_index
    positions = [slot.position + i for i, token in enumerate(tokens) if token == image]
    states = torch.stack(tuple(frames)).to(cache.device, cache.dtype)  # [n, P, H]
    each = torch.tensor(positions).repeat_interleave(cache.patches)[None]  # [1, n x P]
    rotation = cache.decoder.rotation(upload(each, cache.device), cache.dtype)
    places, replaced = zip(*(slot.ring.put(p) for p in positions), strict=True)
    cache.write_frames(slot, places[0], states.flatten(0, 1), rotation)
    evicted = tuple(position for position in replaced if position is not None)
    if evicted:
        slot.evictions.append(Eviction("frame", evicted))


def frame_projections(decoder: Decoder) -> list[nn.Linear]:
    """The layers that make keys and values of frames: two of each cross-attention layer."""
    attentions = [decoder.cross_attention(layer) for layer in decoder.cross]
    return [linear for attention in attentions for linear in (attention.k_proj, attention.v_proj)]


def _fuse(linears: Sequence[nn.Linear]) -> Tensor:
    """The layers' weights, one under the other, for one product; their own become views of it."""
    fused = torch.cat([linear.weight.detach() for linear in linears])
    for linear, weight in zip(linears, fused.chunk(len(linears)), strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return fused
