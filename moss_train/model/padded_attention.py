"""Short sequences' cross-attention as one padded batch: each sequence beside its own frames.

The blocks of frame_plan.py suit long sequences. Of many short ones, a block computes every token
with the frames of its neighbours, too; side by side they are a few products of many small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from moss_train.model.gather_rows import RowMap
from moss_train.model.shape_grid import round_up

SHORTEST = 32  # tokens that a sequence is rounded up to at least

# Not infinity, nor what bf16 rounds to it: where no tile of a token's frames is real, it sees
# nothing, and no NaN may come of it.
HIDDEN = -1e30


@dataclass
class PaddedAttention:
    """B sequences that attend frames, padded to S tokens and F frames.

    tokens, frames: maps of the attending tokens into `[B x S]` places, of its frames into
        `[B x F]`; zeros where there is none.
    mask: what is added to scores `[B, S, F x tiles]`: 0 where a token sees a tile, else HIDDEN;
        `[B, 1, F x tiles]` where all tokens of a sequence see the same; None where they see all
        (`FramePlan.with_masks`: of all heads and keys, `[B, 1, ...]`).
    """

    on_device: ClassVar = ("tokens", "frames", "mask")

    shape: tuple[int, int, int]
    tokens: RowMap
    frames: RowMap
    mask: Tensor | None

    @property
    def pairs(self) -> int:
        """(Token, frame) pairs that are computed."""
        batch, tokens, frames = self.shape
        return batch * tokens * frames


def plan_padded(
    tokens: Tensor,
    sequences: Tensor,
    runs: tuple[Tensor, Tensor],
    unmasked: Tensor,
    real: Tensor,
    frame_sequences: Tensor,
    most_pairs: int,
    rounded: bool,
) -> PaddedAttention | None:
    """Lays the n attending tokens of a microbatch of T tokens and F frames out as a padded batch;
    None where that computes more than `most_pairs` (token, frame) pairs.

    Args:
        tokens: those that attend a frame `[n]`, ascending.
        sequences: sequence of each of the microbatch's tokens `[T]`.
        runs: first and last frame that each of them attends `[T]`.
        unmasked: those that attend also the tiles that are not real `[T]`.
        real: whether a tile is `[F, tiles]`.
        frame_sequences: sequence of each frame `[F]`, ascending.
        rounded: whether B, S and the frames of a sequence are rounded (shape_grid.py).
    """
    attending, own, counts = torch.unique_consecutive(
        sequences[tokens], return_inverse=True, return_counts=True
    )
    begin = torch.searchsorted(frame_sequences, attending)
    until = torch.searchsorted(frame_sequences, attending, right=True)
    used, most, width = len(attending), int(counts.max()), int((until - begin).max())
    batch = used
    if rounded:
        batch, most, width = round_up(used), round_up(most, SHORTEST), round_up(width)
    if batch * most * width > most_pairs:
        return None
    begin, until = (pad(x, (0, batch - used)) for x in (begin, until))
    places = own * most + torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[own]
    token_map = RowMap(torch.arange(len(tokens)), places, (len(tokens), batch * most))

    frame = begin[:, None] + torch.arange(width)  # [B, F]
    there = frame < until[:, None]
    frame_map = RowMap(frame[there], there.flatten().nonzero()[:, 0], (len(real), batch * width))

    # What pads a sequence sees what its last token sees, a sequence that pads the batch sees all:
    # nobody reads it.
    counts = pad(counts, (0, batch - used), value=1)
    ends = counts.cumsum(0)[:, None]
    row = torch.minimum(ends - counts[:, None] + torch.arange(most), ends - 1)  # [B, S]
    row = row.clamp(max=len(tokens) - 1)
    first, last, free = (x[tokens][row][..., None] for x in (*runs, unmasked))
    visible = (frame[:, None] >= first) & (frame[:, None] < last)  # [B, S, F]
    tiles = real[frame.clamp(max=len(real) - 1)][:, None]  # [B, 1, F, tiles]
    hidden = ~(visible[..., None] & (tiles | free[..., None])).flatten(2)
    hidden[used:] = False
    shape = (batch, most, width)
    return PaddedAttention(shape, token_map, frame_map, additive_mask(hidden))


def additive_mask(hidden: Tensor) -> Tensor | None:
    """What is added to scores for `hidden` `[B, S, K]`, or one row of all S that see the same; None
    where all is seen.
    """
    if not hidden.any():
        return None
    if (hidden == hidden[:, :1]).all():
        hidden = hidden[:, :1]
    return torch.zeros(hidden.shape).masked_fill(hidden, HIDDEN)
