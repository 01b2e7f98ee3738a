"""The operations in plain torch: what CPUs run, and what the kernels are compared with.

N tokens, `heads` query heads and `KV` heads of D numbers.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.hf.decoder_moss_video import Rotation, attend_few, rotate
from inference.kernels.rows import Buffers, Rows, seen_frames


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
    qkv: Tensor, rotation: Rotation, keys: Tensor, values: Tensor, rows: Rows
) -> Tensor:
    """Rotates queries and keys, and writes keys and values of the new tokens into the buffers.

    Args:
        qkv: `[N, (heads + 2 KV) x D]`.
        rotation: cosines and sines `[N, D]`.
        keys, values: `[slots, KV, L, D]`.

    Returns:
        Queries `[N, heads, D]`.
    """
    kv, head_dim = keys.shape[1], keys.shape[3]
    split = qkv.unflatten(-1, (-1, head_dim))  # [N, heads + 2 KV, D]
    turned = _rotate(split[:, :-kv], rotation)
    slots = rows.slots(len(keys))
    where = slots[:, None], slice(None), rows.places
    new = (len(slots), rows.count, kv, head_dim)
    keys[where] = turned[:, -kv:].reshape(new)
    values[where] = split[:, -kv:].reshape(new)
    return turned[:, :-kv]


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
        keys, values = self.buffers.tokens_of[layer]
        return self._attend(q, keys, values, self.token_mask)

    def frames(self, layer: int, q: Tensor) -> Tensor:
        """What queries `[N, heads, D]` see of the frames `[N, heads x D]`; 0 without a frame."""
        keys, values = self.buffers.frames_of[layer]
        out = self._attend(q, keys, values, self.frame_mask)
        return out * self.sees.flatten()[:, None]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        queries = q.unflatten(0, (-1, self.rows.count)).transpose(1, 2)  # [B, heads, S, D]
        out = attend_few(queries, self.rows.of(keys), self.rows.of(values), mask)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


def product8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ (weight * scale).T` of weights `[out, in]` in 8 bits with one scale a row `[out]`."""
    return F.linear(x, weight.to(x.dtype)) * scale
