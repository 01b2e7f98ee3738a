"""Which text token sees which frame: planned on the host, once for a microbatch.

Frames become visible in the order of their `<|image|>` tokens, so what a run of tokens may see is
a contiguous run of frames. `plan_row` cuts a row of text into blocks of at least MIN_BLOCK tokens,
each with just the frames that some token of it may see; a mask is made only for blocks whose tokens
see different frames, and only of the block's own size. Cost and memory of the cross-attention so
grow with what is attended, never with (all tokens) x (all frames).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

MIN_BLOCK = 128
NEVER = 2**40  # `visible_from` of a padding frame


@dataclass
class Block:
    """Tokens [start, stop) of a row attend frames [first, last) of the microbatch.

    `mask` is None where all of them see all of it, else True where a token sees a tile:
    `[stop - start, (last - first) x T]`.
    """

    start: int
    stop: int
    first: int
    last: int
    mask: Tensor | None = None


@dataclass
class FrameBatch:
    """The frames of a microbatch of B rows, sorted by row, then by `visible_from`.

    positions: token index of each frame's `<|image|>` mark `[F]`, the angle it is rotated by.
    rows: the blocks of each row (B lists). Tokens in no block see nothing.
    sees: True where a token sees a frame `[S, B]`.
    """

    positions: Tensor
    rows: list[list[Block]]
    sees: Tensor
    states: Tensor | None = field(default=None)  # projected frames [F, T x P, H]

    @property
    def count(self) -> int:
        """Frames in the microbatch."""
        return len(self.positions)

    def attended(self) -> int:
        """(Token, frame) pairs that the blocks compute, for the FLOP count."""
        return sum((b.stop - b.start) * (b.last - b.first) for row in self.rows for b in row)


def plan_frames(
    frame_rows: Tensor,
    positions: Tensor,
    lengths: list[int],
    length: int,
    *,
    visible_from: Tensor | None = None,
    visible_until: Tensor | None = None,
    tiles: Tensor | None = None,
    max_tiles: int = 1,
    attend_all: bool = False,
) -> FrameBatch:
    """Plans the cross-attention of a microbatch.

    Args:
        frame_rows: row of each frame `[F]`, ascending.
        positions: token index of each frame's mark `[F]`.
        lengths: tokens of each row without padding; padding attends nothing.
        length: padded length S of the rows.
        visible_from: first token that sees a frame `[F]`; None: its mark. NEVER for padding.
        visible_until: first token that no longer sees it `[F]`; None: all later tokens see it.
        tiles: real tiles of each frame `[F]`, of `max_tiles`; None: all are real.
        attend_all: tokens that see no frame attend every frame slot of their row, unmasked.

    Raises:
        ValueError: frames are not sorted by row and visibility.
    """
    start = positions if visible_from is None else visible_from
    stop = torch.full_like(start, NEVER) if visible_until is None else visible_until
    tiles = torch.full_like(start, max_tiles) if tiles is None else tiles
    tile_real = torch.arange(max_tiles) < tiles[:, None]  # [F, T]
    counts = torch.bincount(frame_rows, minlength=len(lengths)).tolist()
    rows, sees = [], torch.zeros(length, len(lengths), dtype=torch.bool)
    first = 0
    for row, (text, count) in enumerate(zip(lengths, counts, strict=True)):
        last = first + count
        spans = (start[first:last], stop[first:last])
        if any((span.diff() < 0).any() for span in spans):
            raise ValueError(f"the frames of row {row} are not in the order of their tokens")
        visible = _visible(*spans, text)  # [text, f]
        sees[:text, row] = visible.any(1)
        rows.append(_plan_row(visible, tile_real[first:last], first, attend_all))
        first = last
    return FrameBatch(positions, rows, sees)


def _visible(start: Tensor, stop: Tensor, text: int) -> Tensor:
    token = torch.arange(text)[:, None]
    return (token >= start) & (token < stop)


def _plan_row(visible: Tensor, tile_real: Tensor, first: int, attend_all: bool) -> list[Block]:
    """Blocks of one row; `visible`: `[text, f]`, `tile_real`: `[f, T]`, `first`: frame offset."""
    count = visible.shape[1]
    if count == 0 or len(visible) == 0:
        return []
    sees = visible.any(1)
    changes = (visible[1:] != visible[:-1]).any(1).nonzero()[:, 0] + 1
    edges = [0, *changes.tolist(), len(visible)]
    blocks: list[Block] = []
    open_from = 0
    for begin, end in pairwise(edges):
        if not sees[begin]:  # a blind run
            _close(blocks, visible, tile_real, open_from, begin, first)
            if attend_all:
                blocks.append(Block(begin, end, first, first + count))
            open_from = end
        elif end - open_from >= MIN_BLOCK:
            # A long run of tokens that see the same needs no mask: keep it apart.
            if end - begin >= MIN_BLOCK:
                _close(blocks, visible, tile_real, open_from, begin, first)
                open_from = begin
            _close(blocks, visible, tile_real, open_from, end, first)
            open_from = end
    _close(blocks, visible, tile_real, open_from, len(visible), first)
    return blocks


def _close(
    blocks: list[Block], visible: Tensor, tile_real: Tensor, start: int, stop: int, offset: int
) -> None:
    if start == stop:
        return
    part = visible[start:stop]
    seen = part.any(0).nonzero()[:, 0]
    first, last = int(seen[0]), int(seen[-1]) + 1
    mask = (part[:, first:last, None] & tile_real[first:last]).flatten(1)
    whole = bool(mask.all())
    blocks.append(Block(start, stop, offset + first, offset + last, None if whole else mask))
