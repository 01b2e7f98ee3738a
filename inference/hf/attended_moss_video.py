"""Holds what a pass attends: tokens and frames in a transformers cache, and the masks over them.

A copy of this file is in every exported folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .decoder_moss_video import attend

# Inputs of a pass that hold frames in their second dimension.
FRAMES = ("pixel_values", "cross_attention_states", "aspect_ratio_ids", "aspect_ratio_mask")


class CachedTokens:
    """`TokenCache` in a transformers cache (None: nothing is kept). What each layer attends is
    added to `weights`."""

    def __init__(self, cache: Any, mask: Tensor | None, weights: list[Tensor] | None = None):
        self.cache, self.mask, self.weights = cache, mask, weights

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        causal = self.mask is None and q.shape[2] > 1
        mask = _beside(q, self.mask)
        if self.weights is not None:
            self.weights.append(attention_weights(q, k, mask, causal))
        return attend(q, k, v, mask, causal)


class AttendedFrames:
    """`FrameCache` of one forward pass.

    keys_values: of each cross-attention layer, `[B, KV heads, F x T x P, D]`.
    mask: True where a token sees a tile `[B, S, F, T]`.
    own: True for the frames that a row has `[B, F]`. A row without any computes what it computes
        alone: nothing is added to its tokens.
    slots: True for what tokens that see no frame attend, where they attend all `[B, F]`; None:
        they attend nothing.
    weights: a list to which what each layer attends is added; None: it is not computed.
    """

    weights: list[Tensor] | None = None

    def __init__(
        self,
        keys_values: dict[int, tuple[Tensor, Tensor]],
        mask: Tensor,
        own: Tensor,
        slots: Tensor | None,
        dtype: torch.dtype,
    ):
        self.keys_values = keys_values
        tiles = mask.shape[3]
        mask = mask.flatten(2)  # [B, S, F x T]
        sees = mask.any(-1, keepdim=True)
        has_frames = own.any(1)[:, None, None]  # [B, 1, 1]
        if slots is not None:
            mask = mask | (~sees & slots.repeat_interleave(tiles, 1)[:, None])
        self.sees = None if all_true(sees) else sees.to(dtype)
        self.keep = self.sees
        if slots is not None:
            self.keep = None if all_true(has_frames) else has_frames.to(dtype)
        # A row without any key would be NaN: let it attend everything, then drop it.
        mask = mask | ~mask.any(-1, keepdim=True)
        self.mask = None if all_true(mask) else mask[:, None]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = (x.to(q.device) for x in self.keys_values[layer])  # on the CPU, if offloaded
        mask, keep = _beside(q, self.mask), _beside(q, self.keep)
        if mask is not None:
            mask = mask.repeat_interleave(k.shape[2] // mask.shape[-1], dim=-1)
        out = attend(q, k, v, mask)
        if self.weights is not None:
            weights = attention_weights(q, k, mask, False)
            self.weights.append(weights if keep is None else weights * keep[:, None])
        return out if keep is None else out * keep[:, None]


def _beside(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask on the device of a layer's `q`: layers may be on several."""
    return None if mask is None else mask.to(q.device)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """How much each query attends each key `[B, heads, S, L]`; the arguments are `attend`'s."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if causal:
        mask = _causal(0, q.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(q.dtype)


def all_true(mask: Tensor) -> bool:
    """Whether all of a mask is true, so that it can be left out. A graph that is being compiled or
    exported holds for all values: there it is not."""
    return not torch.compiler.is_compiling() and bool(mask.all())


@dataclass
class NewFrames:
    """Frames that a pass brings.

    positions: of each frame's `<|image|>` `[B, F]`, 0 for padding frames.
    marked: True for frames that have one `[B, F]`.
    slots: True for those that are given as frames, by their ratio id if there is one `[B, F]`.
    seen: True for the tiles that it has, where a token is or comes after it `[B, S, F, T]`.
    """

    positions: Tensor
    marked: Tensor
    slots: Tensor
    seen: Tensor


def cache_of_pass(past: Any, use_cache: bool, again: bool) -> Any:
    """The cache that a pass fills, or None.

    Args:
        past: the caller's cache, or None.
        use_cache: a cache is to be made where there is none.
        again: gradient checkpointing runs each layer twice, which would fill a cache twice.

    Raises:
        ValueError: a cache that check_cache refuses, or one with gradient checkpointing.
    """
    if past is not None:
        if again:
            raise ValueError("past_key_values: not with gradient checkpointing")
        check_cache(past)
        return past
    return DynamicCache() if use_cache and not again else None


def check_cache(cache: Any) -> None:
    """Raises ValueError for a cache that holds more, less or other than what was put in: static
    ones (empty places would be attended), sliding windows (frames would go), quantized ones."""
    layers = getattr(cache, "layers", None)
    known = (DynamicLayer, FrameLayer)
    if layers is None or any(type(layer) not in known for layer in layers):
        raise ValueError(
            f"past_key_values: {type(cache).__name__}: only DynamicCache works with this model: "
            "leave cache_implementation out, or say 'dynamic'"
        )


def check_frame_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError for a cross_attention_mask of another shape than `[B, S, F, T]`, or of
    numbers that are added to scores."""
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"cross_attention_mask is of {list(mask.shape)} rows, tokens, frames and tiles; the "
            f"input, with the frames in the cache, has {list(shape)}"
        )
    if mask.is_floating_point() and bool((mask < 0).any()):
        raise ValueError("cross_attention_mask: 1 where a token sees a tile, else 0")


def leave_out_cached_frames(inputs: dict[str, Any], is_image: Tensor, first: bool) -> None:
    """Removes the frames that are in the cache from the inputs that `generate` gives to a pass.

    is_image: True for the pass's `<|image|>` tokens `[B, S]`.
    first: the pass begins a turn. Then the frames of these tokens may be given, or those of the
    whole conversation. Others are left as they are, for the model to refuse.
    """
    start = _first_new_frame(inputs, is_image) if first else None
    for name in FRAMES:
        value = inputs.get(name)
        if value is not None:
            inputs[name] = None if start is None else value[:, start:]


def frame_mask_of_pass(mask: Tensor, past: int, count: int) -> Tensor:
    """The rows of a cross_attention_mask `[B, S, F, T]`, of a whole conversation or of its last
    turn, for `count` tokens after `past`. Tokens that it does not know see what its last one sees.
    """
    rows = mask[:, past:] if mask.shape[1] > count else mask
    missing = max(0, count - rows.shape[1])
    return torch.cat((rows, mask[:, -1:].expand(-1, missing, -1, -1)), dim=1)


def _first_new_frame(inputs: dict[str, Any], is_image: Tensor) -> int | None:
    """The index of the first given frame that is not in the cache; None: all are in it."""
    pixels, states = inputs.get("pixel_values"), inputs.get("cross_attention_states")
    frames = states if pixels is None else pixels
    if frames is None:
        return None
    marks = is_image.sum(1)
    frame_counts = real_frames(pixels, inputs.get("aspect_ratio_ids"), frames).sum(1)
    kept = [one for one in inputs["past_key_values"].layers if isinstance(one, FrameLayer)]
    own = kept[0].own if kept else None
    cached = torch.zeros_like(marks) if own is None else own.sum(1).to(marks.device)
    if frame_counts.equal(marks) or not frame_counts.equal(cached + marks):
        return 0
    if not marks.any():
        return None
    if not bool((cached == cached[0]).all()):
        raise ValueError(
            f"the rows have {cached.tolist()} frames in the cache: where these numbers differ, "
            "give the frames of this turn alone"
        )
    return int(cached[0])


class FrameLayer(DynamicLayer):
    """A layer of a transformers cache with keys and values of frames, not of tokens.

    seen: True for what the last token so far saw `[B, F, T]`.
    own, slots: of its frames `[B, F]`, as in AttendedFrames.
    """

    seen: Tensor | None = None
    own: Tensor | None = None
    slots: Tensor | None = None

    def keep(self, seen: Tensor, own: Tensor, slots: Tensor) -> None:
        """Notes which row has and sees which frame."""
        self.seen, self.own, self.slots = seen, own, slots

    def crop(self, *_: Any) -> None:
        """Takes nothing back: what assisted generation takes back are tokens."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows change places."""
        super().reorder_cache(beam_idx)
        self._rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes several."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows stay."""
        super().batch_select_indices(indices)
        self._rows(lambda rows: rows[indices.to(rows.device)])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.seen is not None and self.own is not None and self.slots is not None:
            self.keep(change(self.seen), change(self.own), change(self.slots))


def frames_in(cache: Any, layer: int) -> FrameLayer | None:
    """The frames of a cache, as its layer number `layer` has them; None: it has none yet."""
    layers = getattr(cache, "layers", [])
    found = layers[layer] if layer < len(layers) else None
    return found if isinstance(found, FrameLayer) and found.seen is not None else None


def hold_frames(cache: Any, layer: int) -> None:
    """Makes a layer that has got keys and values one of frames."""
    cache.layers[layer].__class__ = FrameLayer


def real_frames(pixels: Tensor | None, ratio_ids: Tensor | None, states: Tensor) -> Tensor:
    """True for the frames of each row, False for padding frames `[B, F]`, whose ratio id is 0 or
    whose pixels are all 0."""
    real = [] if ratio_ids is None else [ratio_ids > 0]
    if pixels is not None:
        real.append(pixels.flatten(2).any(-1))
    if real:
        return real[0] & real[-1]
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


def token_positions(
    position_ids: Tensor | None, mask: Tensor | None, past: int, x: Tensor
) -> Tensor:
    """Positions `[B, S]` of the tokens `x` `[B, S, H]`: `position_ids`, or the index of each
    among those that are not padding by the attention_mask `mask`.

    Raises:
        ValueError: `position_ids` or `mask` are not of these tokens.
    """
    length = x.shape[1]
    if mask is not None:
        _check_mask(mask, past, length)
    if position_ids is not None and position_ids.shape[-1] != length:
        raise ValueError(f"position_ids: {list(position_ids.shape)} for {length} tokens: [B, S]")
    if position_ids is None and mask is not None and mask.ndim == 2:
        position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    elif position_ids is None:
        position_ids = torch.arange(past, past + length, device=x.device)[None]
    return position_ids.expand(len(x), -1)


def token_mask(attention_mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """True where a token sees a token `[B, 1, S, past + S]`; None: causal without padding."""
    if attention_mask is not None and attention_mask.ndim == 4:
        added = attention_mask.is_floating_point()
        return attention_mask >= 0 if added else attention_mask.bool()
    if attention_mask is None or all_true(attention_mask):
        if past == 0 or length == 1:
            return None
        device = None if attention_mask is None else attention_mask.device
        return _causal(past, length, device)[None, None]
    mask = attention_mask.bool()[:, None, None] & _causal(past, length, attention_mask.device)
    # Padding on the left sees nothing: let it see itself, for a softmax over nothing is NaN.
    own = torch.eye(past + length, device=mask.device, dtype=torch.bool)[past:]
    return mask | own


def _check_mask(mask: Tensor, past: int, length: int) -> None:
    """Raises ValueError for an attention_mask of another shape, or of floats above 0."""
    total = past + length
    shapes = {2: (total,), 4: (length, total)}
    if tuple(mask.shape[mask.ndim // 2 :]) != shapes.get(mask.ndim):
        raise ValueError(
            f"attention_mask: {list(mask.shape)} for {length} tokens after {past} in the cache: "
            f"[B, {total}], or [B, 1, {length}, {total}]"
        )
    if mask.ndim == 4 and mask.is_floating_point() and bool((mask > 0).any()):
        raise ValueError(
            "attention_mask: of floats, which are added to scores, it must be 0 where a token sees "
            "a token and negative elsewhere; give ones and zeros as integers or bool"
        )


def _causal(past: int, length: int, device: torch.device | None) -> Tensor:
    key = torch.arange(past + length, device=device)
    return key <= torch.arange(past, past + length, device=device)[:, None]
