"""Keys and values of all slots, in buffers of fixed size on the device.

Self-attention: `max_tokens` of each slot, in the order of arrival. Cross-attention: a ring of
`window` frames and one place more (slots.FrameRing says which place holds which frame). A frame
may lie anywhere in the ring: its position is in its keys. Keys and values are kept once per KV
head. How a pass attends them is in batches.py (any number of tokens) and inference/kernels (passes
of fixed shape).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.engine.memory import CacheSizes
from inference.engine.slots import NEVER, Eviction, Slot
from inference.engine.upload import upload
from inference.hf.decoder_moss_video import Decoder, Rotation, rotate
from inference.kernels import plain


class KVCache:
    """The buffers, and what moves frames and tokens in them.

    Args:
        decoder: whose layers they serve. Its weights say how many KV heads this rank has.
        slots: sessions at once.
        max_tokens: tokens of a slot.
        window: frames of a slot.

    Raises:
        ValueError: the device has not so much memory.
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

        self.sizes = CacheSizes(
            own=len(self.own), cross=len(decoder.cross), kv_heads=kv_heads, head_dim=head_dim,
            max_tokens=max_tokens, window=window, patches=self.patches, item=dtype.itemsize,
        )  # fmt: skip
        self.sizes.check(slots, device)

        def buffer(layers: int, length: int) -> Tensor:
            # Zeros: what a mask hides must still be a number.
            shape = (layers, 2, slots, kv_heads, length, head_dim)
            return torch.zeros(shape, device=device, dtype=dtype)

        self.text = buffer(len(self.own), self.sizes.text_length)
        self.frames = buffer(len(decoder.cross), self.sizes.frames_length)
        self.tokens_of = {layer: self.text[n] for n, layer in enumerate(self.own)}
        self.frames_of = {layer: self.frames[n] for n, layer in enumerate(decoder.cross)}
        # Positions between which a frame is seen, for static batches.
        self.views = torch.full((2, slots, window + 1), NEVER, device=device)
        self.first, self.last = self.views
        self._projection = _fuse(frame_projections(decoder))
        first = decoder.cross_attention(decoder.cross[0])
        self._rotates, self._eps = first.rope, first.k_norm.eps
        norms = [decoder.cross_attention(layer).k_norm.weight.detach() for layer in decoder.cross]
        self._k_norms = torch.stack(norms)[:, None, None]  # [layers, 1, 1, D]

    def reset(self, slot: Slot) -> None:
        """Forgets a slot's frames; its tokens are overwritten."""
        self.views[:, slot.index] = NEVER

    def write_frames(self, slot: Slot, place: int, states: Tensor, rotation: Rotation) -> None:
        """Keys and values of states `[n x P, H]` into the slot's ring, from `place` on."""
        kept = self.frames[:, :, slot.index]  # [layers, 2, KV heads, L, D]
        layers, _, heads, _, width = kept.shape
        projected = F.linear(states, self._projection).view(-1, layers, 2, heads, width)
        projected = projected.permute(1, 2, 3, 0, 4)
        keys = rotate(projected[:, 0], rotation) if self._rotates else projected[:, 0]
        span = slice(place * self.patches, place * self.patches + len(states))
        kept[:, 0, :, span] = plain.norm(keys, self._k_norms, self._eps)
        kept[:, 1, :, span] = projected[:, 1]
        self.write_views(slot)

    def commit_eviction(self, slot: Slot) -> None:
        """After the pass in which a frame arrived, moves it to the place of the one it replaces."""
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
        """A slot's keys and values, on the CPU."""
        used = slot.ring.used * self.patches
        return {
            "text": self.text[:, :, slot.index, :, : slot.length].cpu().clone(),
            "frames": self.frames[:, :, slot.index, :, :used].cpu().clone(),
        }

    def restore(self, slot: Slot, state: dict[str, Tensor]) -> None:
        """Writes back what `save` returned."""
        for name, buffer in (("text", self.text), ("frames", self.frames)):
            saved = state[name]
            buffer[:, :, slot.index, :, : saved.shape[-2]] = saved.to(self.device, self.dtype)
        self.write_views(slot)


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
    each = upload(positions, cache.device)
    each = each.repeat_interleave(cache.patches)[None]  # [1, n x P]
    rotation = cache.decoder.rotation(each, cache.dtype)
    places, replaced = zip(*(slot.ring.put(p) for p in positions), strict=True)
    cache.write_frames(slot, places[0], states.flatten(0, 1), rotation)
    gone = tuple(position for position in replaced if position is not None)
    if gone:
        slot.evictions.append(Eviction("frame", gone))


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
