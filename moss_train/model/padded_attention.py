"""Short sequences' cross-attention as one padded batch: each sequence beside its own frames.

The blocks of frame_plan.py suit long sequences. Of many short ones, a block computes every token
with the frames of its neighbours, too; side by side they are a few products of many small matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moss_train.model.gather_rows import RowMap

# Not infinity, nor what bf16 rounds to it: a padding token sees nothing, and no NaN may come of it.
HIDDEN = -1e30


@dataclass
class PaddedAttention:
    """B sequences that attend frames, padded to S tokens and F frames.

    tokens, frames: maps of the attending tokens into `[B x S]` places, of its frames into
        `[B x F]`; zeros where there is none.
    mask: what is added to scores `[B, S, F x tiles]`: 0 where a token sees a tile, else HIDDEN.
    """

    on_device: ClassVar = ("tokens", "frames", "mask")

    shape: tuple[int, int, int]
    tokens: RowMap
    frames: RowMap
    mask: Tensor

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
) -> PaddedAttention:
    """Lays the n attending tokens of a microbatch of T tokens and F frames out as a padded batch.

    Args:
        tokens: those that attend a frame `[n]`, ascending.
        sequences: sequence of each of the microbatch's tokens `[T]`.
        runs: first and last frame that each of them attends `[T]`.
        unmasked: those that attend also the tiles that are not real `[T]`.
        real: whether a tile is `[F, tiles]`.
        frame_sequences: sequence of each frame `[F]`, ascending.
    """
    attending, own, counts = torch.unique_consecutive(
        sequences[tokens], return_inverse=True, return_counts=True
    )
    begin = torch.searchsorted(frame_sequences, attending)
    until = torch.searchsorted(frame_sequences, attending, right=True)
    batch, most, width = len(attending), int(counts.max()), int((until - begin).max())
    places = own * most + torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[own]
    token_map = RowMap(torch.arange(len(tokens)), places, (len(tokens), batch * most))

    frame = begin[:, None] + torch.arange(width)  # [B, F]
    there = frame < until[:, None]
    frame_map = RowMap(frame[there], there.flatten().nonzero()[:, 0], (len(real), batch * width))

    first, last = (x.new_zeros(batch * most).index_copy_(0, places, x[tokens]) for x in runs)
    free = unmasked.new_zeros(batch * most).index_copy_(0, places, unmasked[tokens])
    first, last, free = (x.view(batch, most, 1) for x in (first, last, free))
    seen = (frame[:, None] >= first) & (frame[:, None] < last)  # [B, S, F]
    tiles = real[frame.clamp(max=len(real) - 1)][:, None]  # [B, 1, F, tiles]
    hidden = ~(seen[..., None] & (tiles | free[..., None]))
    mask = torch.zeros(hidden.shape).masked_fill(hidden, HIDDEN)
    return PaddedAttention((batch, most, width), token_map, frame_map, mask.flatten(2))
