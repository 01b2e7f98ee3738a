"""The operations in plain torch: what CPUs run, and what the kernels are compared with.

N tokens, `heads` query heads and `KV` heads of D numbers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.hf.decoder_moss_video import Rotation, attend_few, rotate
from inference.kernels.rows import Buffers, PassSize, Rows, seen_frames

EIGHT_BITS = torch.float8_e4m3fn  # of keys and values, where their buffers are in 8 bits
LARGEST = torch.finfo(EIGHT_BITS).max
GROUP = 128  # weights in 4 bits that have one scale


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, rounded before the weight as Llama does."""
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def add_norm(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    """Adds `branch` (times `scale` `[N]`) to `x` `[N, H]` in place; the RMSNorm of the sum."""
    if branch is not None:
        x.add_(branch if scale is None else branch * scale[:, None])
    return norm(x, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """`[N, 2 I]`, gates first -> `[N, I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate_and_keep(
    qkv: Tensor,
    rotation: Rotation,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    scales: Tensor | None = None,
) -> Tensor:
    """Rotates queries and keys, and writes keys and values of the new tokens into the buffers.

    Args:
        qkv: `[N, (heads + 2 KV) x D]`.
        rotation: cosines and sines `[N, D]`.
        keys, values: `[slots, KV, L, D]`.
        scales: of keys and values `[2, KV]`, where these are in 8 bits.

    Returns:
        Queries `[N, heads, D]`.
    """
    kv, head_dim = keys.shape[1], keys.shape[3]
    split = qkv.unflatten(-1, (-1, head_dim))  # [N, heads + 2 KV, D]
    turned = _rotate(split[:, :-kv], rotation)
    slots = rows.slots(len(keys))
    where = slots[:, None], slice(None), rows.places
    new = (len(slots), rows.count, kv, head_dim)
    of_keys, of_values = (None, None) if scales is None else scales[..., None]
    keys[where] = kept(turned[:, -kv:].reshape(new), of_keys)
    values[where] = kept(split[:, -kv:].reshape(new), of_values)
    return turned[:, :-kv]


def kept(x: Tensor, scale: Tensor | None) -> Tensor:
    """Keys or values as a buffer has them: in 8 bits, `x / scale`; without a scale as they are."""
    if scale is None:
        return x
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(EIGHT_BITS)


def read(numbers: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `kept` has put into a buffer."""
    return numbers if scale is None else numbers.to(dtype) * scale.to(dtype)


def norm_and_rotate(q: Tensor, weight: Tensor, eps: float, rotation: Rotation | None) -> Tensor:
    """RMSNorm of each head by `weight` `[D]`, then its rotation, if there is one:
    `[N, heads x D]` -> `[N, heads, D]`."""
    normed = norm(q.unflatten(-1, (-1, len(weight))), weight, eps)
    return normed if rotation is None else _rotate(normed, rotation)


def _rotate(x: Tensor, rotation: Rotation) -> Tensor:
    cos, sin = (r[:, None] for r in rotation)
    return rotate(x[:, :, None], (cos, sin))[:, :, 0]


class Attention:
    """What the new tokens of a pass attend: masks are made once for all layers."""

    any_rows: ClassVar = False

    def __init__(self, buffers: Buffers, rows: Rows):
        self.buffers, self.rows = buffers, rows
        places = next(iter(buffers.tokens_of.values())).shape[-2]
        key = torch.arange(places, device=rows.length.device)
        self.token_mask = (key <= rows.places[..., None])[:, None]  # [B, 1, S, L]
        seen = seen_frames(buffers, rows)
        self.sees = seen.any(-1)  # [B, S]
        # A softmax over nothing is NaN: such tokens attend all, and `sees` drops the result.
        mask = (seen | ~self.sees[..., None]).repeat_interleave(buffers.patches, dim=-1)
        places = next(iter(buffers.frames_of.values())).shape[-2]
        self.frame_mask = F.pad(mask, (0, places - mask.shape[-1]))[:, None]

    def tokens(self, layer: int, q: Tensor) -> Tensor:
        """What queries `[N, heads, D]` see of all tokens up to their own `[N, heads x D]`."""
        keys, values = self._read(self.buffers.tokens_of[layer], layer, q.dtype)
        return self._attend(q, keys, values, self.token_mask)

    def frames(self, layer: int, q: Tensor) -> Tensor:
        """What queries `[N, heads, D]` see of the frames `[N, heads x D]`; 0 without a frame."""
        keys, values = self._read(self.buffers.frames_of[layer], layer, q.dtype)
        out = self._attend(q, keys, values, self.frame_mask)
        return out * self.sees.flatten()[:, None]

    def _read(self, numbers: Tensor, layer: int, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of the rows `[B, KV, L, D]`."""
        scales = self.buffers.scales_of.get(layer)
        each = (None, None) if scales is None else scales[..., None, None]
        parts = zip(numbers, each, strict=True)
        return [read(self.rows.of(part), scale, dtype) for part, scale in parts]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        queries = q.unflatten(0, (-1, self.rows.count)).transpose(1, 2)  # [B, heads, S, D]
        out = attend_few(queries, keys, values, mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    @staticmethod
    def scratch(size: PassSize) -> int:
        """Masks; scores in fp32 with and without one; keys and values in 8 bits, converted."""
        pairs = size.rows * size.count * size.places
        scores = 4 * pairs + 10 * size.heads * pairs
        if not size.eight_bit:
            return scores
        side = size.rows * size.kv_heads * size.places * size.width * size.item  # keys, or values
        return max(scores + 2 * side, 3 * side)


def product8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ (weight * scale).T` of weights `[out, in]` in 8 bits with one scale a row `[out]`."""
    return F.linear(x, weight.to(x.dtype)) * scale


def product4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ w.T` of weights in 4 bits, as `from_four_bits` reads them. x: `[N, in]`."""
    full = from_four_bits(weight, scale.to(x.dtype))
    return F.linear(x, full[:, : x.shape[-1]])


def from_four_bits(weight: Tensor, scale: Tensor) -> Tensor:
    """Weights `[out, groups * 128]` in the scale's dtype, of which the last inputs may be none.

    weight: uint8 `[out, groups * 64]`; byte j of a group has its numbers j (in the lower bits) and
    64 + j, each more by 8 than it stands for. scale: `[out, groups]`.
    """
    pairs = weight.unflatten(1, (-1, GROUP // 2))  # [out, groups, 64]
    numbers = torch.cat((pairs & 15, pairs >> 4), -1).to(scale.dtype) - 8
    return (numbers * scale[..., None]).flatten(1)
