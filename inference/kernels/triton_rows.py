"""What happens to each token alone, as Triton kernels: norms, rotations, SwiGLU, 8-bit weights.

In plain torch a norm is four kernels and a rotation ten, each of which a decoding step waits for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from inference.hf.decoder_moss_video import Rotation
from inference.kernels.rows import Rows


@triton.jit
def _add_norm(x, branch, scale, weight, out, eps, H, BLOCK: tl.constexpr, ADD: tl.constexpr,
              SCALED: tl.constexpr):  # fmt: skip
    """One token `[H]`: x += branch x scale, and the RMSNorm of the sum."""
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    inside = i < H
    value = tl.load(x + row * H + i, mask=inside, other=0.0)
    if ADD:
        added = tl.load(branch + row * H + i, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            added = added * tl.load(scale + row).to(tl.float32)
        value = (value.to(tl.float32) + added).to(x.dtype.element_ty)
        tl.store(x + row * H + i, value, mask=inside)
    exact = value.to(tl.float32)
    normed = exact * tl.rsqrt(tl.sum(exact * exact, 0) / H + eps)
    weights = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(out.dtype.element_ty).to(tl.float32) * weights
    tl.store(out + row * H + i, normed.to(out.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float
) -> Tensor:
    """As `plain.add_norm`."""
    out = torch.empty_like(x)
    _add_norm[(len(x),)](
        x, x if branch is None else branch, x if scale is None else scale, weight, out, eps,
        x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), ADD=branch is not None,
        SCALED=scale is not None, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _swiglu(gate_up, out, inner, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    gate = tl.load(gate_up + row * 2 * inner + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + i, mask=inside, other=0.0)
    gate = (gate / (1 + tl.exp(-gate))).to(up.dtype).to(tl.float32)
    tl.store(out + row * inner + i, (gate * up.to(tl.float32)).to(up.dtype), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `plain.swiglu`."""
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    _swiglu[(rows, triton.cdiv(inner, 1024))](gate_up, out, inner, BLOCK=1024)
    return out


@triton.jit
def _store_8_bits(place, x, inside):
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(place, x.to(place.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_keep(
    qkv, cos, sin, q, keys, values, scales, slot, length, new, places,
    HEADS: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """One head of one token: the halves of a head are the pairs that are rotated. EIGHT: keys and
    values are kept in 8 bits, divided by `scales` `[2, KV]`."""
    token, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    inside = i < HALF
    source = qkv + (token * (HEADS + 2 * KV) + head) * 2 * HALF + i
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    row = token // new
    place = tl.load(length + row) + token % new
    kept = ((tl.load(slot + row) * KV + (head - HEADS) % KV) * places + place) * 2 * HALF + i
    if head >= HEADS + KV:
        if EIGHT:
            scale = tl.load(scales + head - HEADS)
            _store_8_bits(values + kept, low.to(tl.float32) / scale, inside)
            _store_8_bits(values + kept + HALF, high.to(tl.float32) / scale, inside)
        else:
            tl.store(values + kept, low, mask=inside)
            tl.store(values + kept + HALF, high, mask=inside)
    else:
        c = tl.load(cos + token * 2 * HALF + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * 2 * HALF + i, mask=inside, other=0.0).to(tl.float32)
        a, b = low.to(tl.float32), high.to(tl.float32)
        first, second = (a * c - b * s).to(low.dtype), (b * c + a * s).to(low.dtype)
        if head < HEADS:
            target = q + (token * HEADS + head) * 2 * HALF + i
            tl.store(target, first, mask=inside)
            tl.store(target + HALF, second, mask=inside)
        elif EIGHT:
            scale = tl.load(scales + head - HEADS)
            _store_8_bits(keys + kept, first.to(tl.float32) / scale, inside)
            _store_8_bits(keys + kept + HALF, second.to(tl.float32) / scale, inside)
        else:
            tl.store(keys + kept, first, mask=inside)
            tl.store(keys + kept + HALF, second, mask=inside)


def rotate_and_keep(
    qkv: Tensor,
    rotation: Rotation,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    scales: Tensor | None = None,
) -> Tensor:
    """As `plain.rotate_and_keep`."""
    _, kv, places, width = keys.shape
    heads = qkv.shape[1] // width - 2 * kv
    q = qkv.new_empty(len(qkv), heads, width)
    _rotate_and_keep[(len(qkv), heads + 2 * kv)](
        qkv, *rotation, q, keys, values, q if scales is None else scales, rows.slots(len(keys)),
        rows.length, rows.count, places, HEADS=heads, KV=kv, HALF=width // 2,
        BLOCK=triton.next_power_of_2(width // 2), EIGHT=scales is not None, num_warps=1,
    )  # fmt: skip
    return q


@triton.jit
def _norm_and_rotate(
    q, weight, cos, sin, out, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    token, head, i = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    inside = i < HALF
    here = (token * HEADS + head) * 2 * HALF + i
    a = tl.load(q + here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(q + here + HALF, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    size = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + eps)
    a = (a * size).to(dtype).to(tl.float32)
    b = (b * size).to(dtype).to(tl.float32)
    a = a * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    b = b * tl.load(weight + HALF + i, mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        c = tl.load(cos + token * 2 * HALF + i, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * 2 * HALF + i, mask=inside, other=0.0).to(tl.float32)
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    tl.store(out + here, a.to(dtype), mask=inside)
    tl.store(out + here + HALF, b.to(dtype), mask=inside)


def norm_and_rotate(q: Tensor, weight: Tensor, eps: float, rotation: Rotation | None) -> Tensor:
    """As `plain.norm_and_rotate`."""
    width = len(weight)
    heads = q.shape[1] // width
    out = q.new_empty(len(q), heads, width)
    _norm_and_rotate[(len(q), heads)](
        q, weight, *((q, q) if rotation is None else rotation), out, eps,
        HEADS=heads, HALF=width // 2, BLOCK=triton.next_power_of_2(width // 2),
        ROTATED=rotation is not None, num_warps=1,
    )  # fmt: skip
    return out
