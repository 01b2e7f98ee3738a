"""Attention of a few new tokens over many keys, as Triton kernels.

A decoding step has few queries: a kernel that gives a KV head to one block of threads leaves most
of a GPU idle. Here the keys are split: each program goes over one part of a row's keys for all
query heads of one KV head, which read each key once; a second kernel joins the parts by their
log-sum-exp (Flash-Decoding, Dao et al. 2023). How many keys a row has is read on the device, so
that a captured graph serves any length.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from inference.kernels.rows import Buffers, PassSize, Rows, seen_frames

KEYS = 64  # a program reads at once
PROGRAMS = 528  # aimed at: four for each of the 132 processors of an H100 or H200
MOST_PARTS = 64
MOST_QUERIES = 64  # of a program: query heads of a KV head x new tokens


@triton.jit
def _attend_part(
    q, keys, values, scales, slot, limit, position, first, last, sums, stats,
    scale, places, patches, window, new,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    QUERIES: tl.constexpr, PARTS: tl.constexpr, KEYS: tl.constexpr, FRAMES: tl.constexpr,
    EIGHT: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one KV head, for one tile of a row's queries.

    q `[B, new, KV, GROUP, D]`; keys, values `[slots, KV, places, D]`; limit: keys of each row
    `[B]`; sums `[B, KV, new x GROUP, PARTS, D]`; stats: the same with a maximum and a sum for D.
    FRAMES: keys are of frames, of `patches` each, seen as `first` and `last` `[slots, window]` say;
    else of tokens, the last `new` of which are the queries' own. EIGHT: keys and values are in 8
    bits, and were divided by `scales` `[2, KV]`.
    """
    row, head = tl.program_id(0) // KV, tl.program_id(0) % KV
    tile, part = tl.program_id(1), tl.program_id(2)
    at = tile * QUERIES + tl.arange(0, QUERIES)  # of this row and head: token, then group
    token, real = at // GROUP, at < new * GROUP
    d, j = tl.arange(0, D2), tl.arange(0, KEYS)
    inside = d < D
    where = ((row * new + token) * KV + head) * GROUP + at % GROUP
    queries = tl.load(
        q + where[:, None] * D + d[None, :], mask=real[:, None] & inside[None, :], other=0.0
    )
    index = tl.load(slot + row)
    base = (index * KV + head) * places * D
    count = tl.load(limit + row)
    each = tl.cdiv(tl.cdiv(count, PARTS), KEYS) * KEYS
    begin = part * each
    end = tl.minimum(begin + each, count)
    stands = tl.load(position + row) + token
    if EIGHT:
        scale *= tl.load(scales + head)
    most = tl.full([QUERIES], -1.0e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, D2], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + j
        there = key < end
        block = base + key[:, None] * D + d[None, :]
        k = tl.load(keys + block, mask=there[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision="ieee") * scale
        if FRAMES:
            frame = index * window + key // patches
            seen = (tl.load(first + frame, mask=there, other=0)[None, :] <= stands[:, None]) & (
                stands[:, None] < tl.load(last + frame, mask=there, other=0)[None, :]
            )
        else:
            seen = key[None, :] <= (count - new + token)[:, None]
        seen = seen & there[None, :]
        scores = tl.where(seen, scores, -1.0e30)
        larger = tl.maximum(most, tl.max(scores, 1))
        fade = tl.exp(most - larger)
        weights = tl.where(seen, tl.exp(scores - larger[:, None]), 0.0)
        v = tl.load(values + block, mask=there[:, None] & inside[None, :], other=0.0)
        v = v.to(queries.dtype)
        out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        most = larger
    if EIGHT:
        out *= tl.load(scales + KV + head)
    place = (((row * KV + head) * new * GROUP) + at) * PARTS + part
    tl.store(sums + place[:, None] * D + d[None, :], out, mask=real[:, None] & inside[None, :])
    tl.store(stats + place * 2, most, mask=real)
    tl.store(stats + place * 2 + 1, total, mask=real)


@triton.jit
def _join_parts(
    sums, stats, out, new,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The whole of one query's parts; 0 for one that sees no key. out `[B, new, KV, GROUP, D]`."""
    pair, at = tl.program_id(0), tl.program_id(1)
    row, head = pair // KV, pair % KV
    part, d = tl.arange(0, PARTS), tl.arange(0, D2)
    inside = d < D
    place = (pair * new * GROUP + at) * PARTS + part
    most, total = tl.load(stats + place * 2), tl.load(stats + place * 2 + 1)
    weight = tl.where(total > 0, tl.exp(most - tl.max(tl.where(total > 0, most, -1.0e30), 0)), 0.0)
    whole = tl.sum(total * weight, 0)
    each = tl.load(sums + place[:, None] * D + d[None, :], mask=inside[None, :], other=0.0)
    joined = tl.sum(each * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    where = ((row * new + at // GROUP) * KV + head) * GROUP + at % GROUP
    tl.store(out + where * D + d, joined.to(out.dtype.element_ty), mask=inside)


class Attention:
    """As `plain.Attention`."""

    any_rows: ClassVar = True

    def __init__(self, buffers: Buffers, rows: Rows):
        self.buffers, self.rows = buffers, rows
        self.slot = rows.slots(len(buffers.first))
        first = rows.of(buffers.first)  # [B, window + 1]
        # Keys up to the last place that is in use: a frame there has a position that is reached.
        place = torch.arange(1, first.shape[1] + 1, device=first.device)
        end = rows.position[:, None] + rows.count
        self.frame_limit = (place * (first < end)).amax(1) * buffers.patches
        self.token_limit = rows.length + rows.count
        self.sees = seen_frames(buffers, rows).any(-1)

    def tokens(self, layer: int, q: Tensor) -> Tensor:
        return self._attend(q, self.buffers.tokens_of[layer], layer, self.token_limit, False)

    def frames(self, layer: int, q: Tensor) -> Tensor:
        return self._attend(q, self.buffers.frames_of[layer], layer, self.frame_limit, True)

    def _attend(self, q: Tensor, kept: Tensor, layer: int, limit: Tensor, frames: bool) -> Tensor:
        (_, kv, places, width), rows, new = kept[0].shape, len(limit), self.rows.count
        scales = self.buffers.scales_of.get(layer)
        group = q.shape[1] // kv
        queries, tiles, parts = _division(rows * kv, new * group, places)
        sums = q.new_empty(rows * kv * new * group, parts, width, dtype=torch.float32)
        stats = q.new_empty(rows * kv * new * group, parts, 2, dtype=torch.float32)
        padded = max(16, triton.next_power_of_2(width))
        _attend_part[(rows * kv, tiles, parts)](
            q.contiguous(), *kept, q if scales is None else scales, self.slot, limit,
            self.rows.position,
            self.buffers.first, self.buffers.last, sums, stats,
            width**-0.5, places, self.buffers.patches, self.buffers.first.shape[1], new,
            KV=kv, GROUP=group, D=width, D2=padded, QUERIES=queries, PARTS=parts, KEYS=KEYS,
            FRAMES=frames, EIGHT=scales is not None, num_warps=4, num_stages=3,
        )  # fmt: skip
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        _join_parts[(rows * kv, new * group)](
            sums, stats, out, new, KV=kv, GROUP=group, D=width, D2=padded, PARTS=parts, num_warps=4
        )
        return out.flatten(1)

    @staticmethod
    def scratch(size: PassSize) -> int:
        """Sums and statistics of all parts, in fp32."""
        queries = size.count * size.heads // size.kv_heads
        *_, parts = _division(size.rows * size.kv_heads, queries, size.places)
        return size.rows * size.count * size.heads * parts * (size.width + 2) * 4


def _division(heads: int, queries: int, places: int) -> tuple[int, int, int]:
    """How the work is divided for so many KV heads of rows, each with so many queries and keys:
    queries of a tile, tiles, and into how many parts keys are split, a power of two, for about
    `PROGRAMS` programs."""
    tile = min(max(16, triton.next_power_of_2(queries)), MOST_QUERIES)
    tiles = triton.cdiv(queries, tile)
    pairs = heads * tiles
    wanted = triton.next_power_of_2(max(1, PROGRAMS // (2 * pairs) + 1))
    most = triton.next_power_of_2(triton.cdiv(places, KEYS))
    return tile, tiles, min(MOST_PARTS, wanted, most)
