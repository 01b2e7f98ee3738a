"""Which text token sees which frame: planned on the host, once for a microbatch.

Frames become visible in the order of their `<|image|>` tokens, so what a token may see is a run of
frames [first, last): two numbers a token. Tokens are cut into blocks of at least MIN_BLOCK, each
with just the frames that some token of it may see; a mask is made only for blocks whose tokens see
different frames, and only of the block's own size. Cost and memory of the cross-attention so grow
with what is attended, never with (all tokens) x (all frames).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from moss_train.model.flex_attention import FlexPlan, plan_flex
from moss_train.model.gather_rows import RowSubset
from moss_train.model.padded_attention import PaddedAttention, additive_mask, plan_padded
from moss_train.model.sdpa import spread
from moss_train.model.shape_grid import round_up

MIN_BLOCK = 128  # tokens
SHORTEST = 32  # tokens that a block is rounded up to at least
SMALL_BLOCK = 128 * 128  # (token, frame) pairs that a block may have, however few are needed
NEVER = 2**40  # `visible_from` of a padding frame


@dataclass
class Block:
    """Tokens [start, stop) of `FramePlan.tokens` attend frames [first, last) of the microbatch.

    `mask` is None where all of them see all of it, else what is added to scores, HIDDEN where a
    token does not see a tile: `[size, (last - first) x T]`, or one row of all tokens alike
    (`FramePlan.with_masks`: of all heads and keys). `size`: the tokens, and what pads them to a
    rounded length.
    """

    on_device: ClassVar = ("mask",)

    start: int
    stop: int
    first: int
    last: int
    size: int
    mask: Tensor | None = None

    @property
    def pairs(self) -> int:
        """(Token, frame) pairs that are computed."""
        return self.size * (self.last - self.first)


@dataclass
class FramePlan:
    """The F frames of a microbatch of S packed tokens, sorted by sequence, then by visibility.

    positions: index of each frame's `<|image|>` token in its sequence, which gives its rotation
        `[F]`.
    first, last: the frames that each token attends `[S]`, none where they are equal.
    sees: True where a token sees a frame `[S]`; a token without may still attend (`attend_all`).
    tiles: True for the real tiles of each frame `[F, T]`.
    tokens: those that attend a frame at all `[n]`, ascending.
    blocks: what the attention computes, of all of `tokens`.
    rows: where `tokens` are among the rows of all blocks, one block after the other.
    slots: frames that blocks reach to: F, or more where a rounded block has more.
    flex: the same for FlexAttention, in place of blocks, where that was asked for.
    padded: the same as a padded batch, where that computes no more pairs.
    """

    on_device: ClassVar = (
        "positions", "first", "last", "sees", "tiles", "tokens", "attending", "blocks", "rows",
        "flex", "padded",
    )  # fmt: skip

    positions: Tensor
    first: Tensor
    last: Tensor
    sees: Tensor
    tiles: Tensor
    tokens: Tensor
    blocks: list[Block]
    rows: RowSubset
    slots: int
    flex: FlexPlan | None = None
    padded: PaddedAttention | None = None
    states: Tensor | None = field(default=None)  # projected frames [F, T x P, H]

    @property
    def count(self) -> int:
        """Frames in the microbatch."""
        return len(self.positions)

    @cached_property
    def attending(self) -> RowSubset:
        """Picks `tokens` among all S, and puts them back."""
        return RowSubset(self.tokens, len(self.sees))

    @property
    def pairs(self) -> int:
        """(Token, frame) pairs that are computed."""
        one_call = self.padded or self.flex
        return one_call.pairs if one_call else sum(block.pairs for block in self.blocks)

    def with_masks(self, shared: int, keys: int, dtype: torch.dtype) -> FramePlan:
        """A copy of this plan whose masks have the form that attention adds to scores: for the
        `shared` query heads of a KV head and the `keys` of a tile. Made once for all layers, whose
        graphs keep the same masks (256 frames and 2,344 tokens of a stream: 288 MB)."""
        plan = copy.copy(self)  # with what it has cached
        kind, padded = (shared, keys, dtype), self.padded
        plan.blocks = [
            block if block.mask is None else replace(block, mask=spread(block.mask, *kind))
            for block in self.blocks
        ]
        if padded is not None and padded.mask is not None:
            plan.padded = replace(padded, mask=spread(padded.mask[:, None], *kind))
        return plan

    def attended(self) -> int:
        """(Token, frame) pairs that are needed, for the FLOP count (before the plan is moved)."""
        return int((self.last - self.first).sum())


def plan_frames(
    frame_sequences: Tensor,
    positions: Tensor,
    lengths: list[int],
    length: int,
    *,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
    tiles: Tensor | None = None,
    max_tiles: int = 1,
    attend_all: bool = False,
    rounded: bool = False,
    flex: int | None = None,
) -> FramePlan:
    """Plans the cross-attention of a microbatch of packed sequences.

    Args:
        frame_sequences: sequence of each frame `[F]`, ascending.
        positions: index of each frame's `<|image|>` token in its sequence `[F]`.
        lengths: tokens of each sequence.
        length: S, their sum and what padding follows; padding attends nothing.
        visible_from: first token of the sequence that sees a frame `[F]`; None: its `<|image|>`
            token. NEVER for padding.
        visible_until: first token that no longer sees it `[F]`; None: all later tokens see it.
        tiles: real tiles of each frame `[F]`, of `max_tiles`; None: all are real.
        attend_all: tokens that see no frame attend every frame slot of their sequence, unmasked.
        rounded: whether what is computed has rounded lengths (shape_grid.py).
        flex: P, vision tokens of a tile: FlexAttention is to run in place of blocks, where there
            are enough tokens.

    Raises:
        ValueError: the frames of a sequence are not sorted by visibility.
    """
    start = positions if visible_from is None else visible_from
    stop = torch.full_like(start, NEVER) if visible_until is None else visible_until
    _check_order(frame_sequences, start, stop)
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    # In the packed sequence, nothing is seen beyond the frame's own sequence.
    start, stop = (
        torch.minimum((ends - sizes)[frame_sequences] + x, ends[frame_sequences])
        for x in (start, stop)
    )
    token = torch.arange(length)
    first = torch.searchsorted(stop, token, right=True)
    last = torch.searchsorted(start, token, right=True)
    sees = last > first
    unmasked = torch.zeros_like(sees)
    sequence = torch.searchsorted(ends, token, right=True)  # len(lengths) for padding
    if attend_all:
        bounds = torch.searchsorted(frame_sequences, torch.arange(len(lengths) + 2))
        unmasked = ~sees
        first = torch.where(unmasked, bounds[sequence], first)
        last = torch.where(unmasked, bounds[sequence + 1], last)
    count = torch.full_like(start, max_tiles) if tiles is None else tiles
    real = torch.arange(max_tiles) < count[:, None]
    tokens = (last > first).nonzero()[:, 0]
    runs = first[tokens], last[tokens], unmasked[tokens], real
    planned = plan_flex(*runs, flex) if flex else None
    blocks = [] if planned else _Blocks(*runs, rounded).blocks
    slots = max([len(real), *(block.last for block in blocks)])
    plan = FramePlan(
        positions, first, last, sees, real, tokens, blocks, _rows(blocks), slots, planned
    )
    if len(tokens):
        plan.padded = plan_padded(
            tokens, sequence, (first, last), unmasked, real, frame_sequences, plan.pairs, rounded
        )
    return plan


def _check_order(frame_sequences: Tensor, start: Tensor, stop: Tensor) -> None:
    same = frame_sequences.diff() == 0
    for times in (start, stop):
        wrong = (same & (times.diff() < 0)).nonzero()
        if len(wrong):
            sequence = int(frame_sequences[wrong[0, 0]])
            raise ValueError(
                f"the frames of sequence {sequence} are not in the order of their tokens"
            )


def _rows(blocks: list[Block]) -> RowSubset:
    """Where the tokens lie among the rows of all blocks, one block after the other."""
    starts = [0, *accumulate(block.size for block in blocks)]
    places = [
        torch.arange(start, start + block.stop - block.start)
        for start, block in zip(starts, blocks, strict=False)
    ]
    return RowSubset(torch.cat(places) if places else torch.arange(0), starts[-1])


class _Blocks:
    """Cuts the tokens that attend a frame into blocks, from left to right."""

    def __init__(self, first: Tensor, last: Tensor, unmasked: Tensor, real: Tensor, rounded: bool):
        self.first, self.last, self.unmasked, self.real = first, last, unmasked, real
        self.rounded = rounded
        self.blocks: list[Block] = []
        self._open(0)
        changes = (first.diff() != 0) | (last.diff() != 0) | (unmasked.diff() != 0)
        edges = [0, *(changes.nonzero()[:, 0] + 1).tolist(), len(first)] if len(first) else []
        for begin, end in pairwise(edges):
            self._run(begin, end)
        self._close()

    def _open(self, start: int) -> None:
        self.start = self.stop = start
        self.lowest, self.highest = NEVER, 0  # frames of the open block
        self.needed = 0  # pairs that its tokens attend

    def _run(self, begin: int, end: int) -> None:
        """Tokens [begin, end), which all attend the same."""
        first, last = int(self.first[begin]), int(self.last[begin])
        # A long run needs no mask: keep it apart.
        if end - begin >= MIN_BLOCK or self._wasteful(end, first, last):
            self._close()
        full = self.start + MIN_BLOCK
        if self.rounded and begin > self.start and end > full:  # the block becomes just full
            self._take(full, first, last)
            begin = full
        self._take(end, first, last)

    def _take(self, end: int, first: int, last: int) -> None:
        begin, self.stop = self.stop, end
        self.lowest, self.highest = min(self.lowest, first), max(self.highest, last)
        self.needed += (end - begin) * (last - first)
        if self.stop - self.start >= MIN_BLOCK:
            self._close()

    def _wasteful(self, end: int, first: int, last: int) -> bool:
        """Whether the open block, with this run, would compute much more than is needed."""
        pairs = (end - self.start) * (max(self.highest, last) - min(self.lowest, first))
        needed = self.needed + (end - self.stop) * (last - first)
        return pairs > max(1.5 * needed, SMALL_BLOCK)

    def _close(self) -> None:
        if self.start == self.stop:
            return
        size, lowest, highest = self.stop - self.start, self.lowest, self.highest
        if self.rounded:
            size, width = round_up(size, SHORTEST), round_up(highest - lowest)
            lowest = max(0, min(lowest, len(self.real) - width))
            highest = lowest + width
        token = torch.arange(self.start, self.start + size).clamp(max=self.stop - 1)
        first, last = self.first[token, None], self.last[token, None]
        frame = torch.arange(lowest, highest)
        visible = ((frame >= first) & (frame < last))[..., None]  # [size, frames, 1]
        tiles = self.real[frame.clamp(max=len(self.real) - 1)]
        real = tiles | self.unmasked[token, None, None]
        mask = additive_mask(~(visible & real).flatten(1)[None])
        mask = None if mask is None else mask[0]
        self.blocks.append(Block(self.start, self.stop, lowest, highest, size, mask))
        self._open(self.stop)
