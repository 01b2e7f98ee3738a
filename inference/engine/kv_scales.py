"""Keys and values in 8 bits (e4m3): by which power of two those of a head are divided.

A number of e4m3 has the same relative precision from 2^-6 to 448. So a scale has only to keep what
is divided by it in that range, and one for each head, known before a session is open, does: a
cached number is one byte and nothing beside it (docs/engine.md has its effect on logits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inference.engine.quantized_linear import QuantizedLinear
from inference.hf.decoder_moss_video import CrossLayer, SelfLayer
from inference.kernels.plain import LARGEST

HEADROOM = 16.0  # how much larger values of frames may be than those of a picture of noise


def of_text(layer: SelfLayer, width: int) -> Tensor:
    """`[2, KV heads]`, of keys and of values: no input makes larger ones.

    A normed input of H numbers has a norm of sqrt(H) at most, so that its product with a row of a
    weight is at most sqrt(H) times the row's norm (Cauchy-Schwarz). A rotation turns pairs of
    numbers, which lie half a head apart.
    """
    norm, attention = layer.input_layernorm.weight.float(), layer.self_attn
    rows = []
    for linear in (attention.k_proj, attention.v_proj):
        weight = linear.full() if isinstance(linear, QuantizedLinear) else linear.weight
        rows.append((weight.float() * norm).norm(dim=1).unflatten(0, (-1, width)))  # [KV heads, D]
    keys, values = rows
    pairs = keys.unflatten(1, (2, -1)).norm(dim=1)  # [KV heads, D / 2]
    most = torch.stack((pairs.amax(1), values.amax(1)))
    return _power_of_two(most * math.sqrt(len(norm)))


def of_frames(layers: Sequence[CrossLayer], values: Tensor) -> Tensor:
    """`[layers, 2, KV heads]`, of keys and of values.

    Keys are normed, and so have a bound. The size of values follows from no weight.

    values: of a picture of noise, `[layers, KV heads, n, D]`; HEADROOM times the largest fits.
    """
    weights = torch.stack([layer.cross_attn.k_norm.weight.float() for layer in layers])
    keys = weights.abs().amax(1, keepdim=True) * math.sqrt(weights.shape[1])  # [layers, 1]
    most = values.float().abs().amax((2, 3)) * HEADROOM
    return _power_of_two(torch.stack((keys.expand_as(most), most), 1))


def _power_of_two(most: Tensor) -> Tensor:
    """The smallest by which `most` is divided to fit; exact in every dtype."""
    return torch.exp2((most.clamp(min=1e-12) / LARGEST).log2().ceil())
