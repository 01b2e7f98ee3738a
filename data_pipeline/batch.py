"""What the loader gives to training: encoded samples, and microbatches of them.

S: tokens of a sequence, F: frames of a sample, T: tiles of a frame of h x w pixels, B: samples of a
microbatch, N: frames of a microbatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Unlearned:
    """What the assistant says in some conversations, and training does not learn.

    truncated_samples: conversations that were longer than `sequence_length`, and cut there.
    truncated_labels: their labels behind the cut.
    turns: the assistant's turns. masked_turns: of these, the ones that the data mark as context.
    """

    truncated_samples: int = 0
    truncated_labels: int = 0
    turns: int = 0
    masked_turns: int = 0

    def __add__(self, other: Unlearned) -> Unlearned:
        return Unlearned(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass
class EncodedSample:
    """One conversation as tensors."""

    key: str  # "<source name>/<webdataset key>"
    tokens: Tensor  # int64 [S]
    labels: Tensor  # int64 [S], not shifted, IGNORED_LABEL where there is no loss
    frames: Tensor  # uint8 [F, T, 3, h, w], RGB, not normalized, unused tiles zero
    frame_positions: Tensor  # int64 [F], index of each frame's <|image|> token in `tokens`
    aspect_ratio_ids: Tensor  # int64 [F], see aspect_ratios.py
    unlearned: Unlearned = field(default_factory=Unlearned)

    @property
    def truncated(self) -> bool:
        """True where the conversation was longer than `sequence_length`."""
        return self.unlearned.truncated_samples > 0


@dataclass
class MicroBatch:
    """B conversations, right padded to the longest; their frames, one after the other."""

    tokens: Tensor  # int64 [B, S], padded with the pad token
    labels: Tensor  # int64 [B, S], padded with IGNORED_LABEL
    lengths: Tensor  # int64 [B], tokens of each conversation without padding
    frames: Tensor  # uint8 [N, T, 3, h, w]
    frame_rows: Tensor  # int64 [N], the conversation (0..B-1) of each frame
    frame_positions: Tensor  # int64 [N], index of its <|image|> token there
    aspect_ratio_ids: Tensor  # int64 [N]
    keys: list[str]  # B sample keys
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> samples skipped before this
    unlearned: Unlearned = field(default_factory=Unlearned)  # of all B

    def samples(self) -> list[EncodedSample]:
        """The conversations, each by itself, without padding (views of this batch)."""
        counts = torch.bincount(self.frame_rows, minlength=len(self.lengths)).tolist()
        frames = (
            x.split(counts) for x in (self.frames, self.frame_positions, self.aspect_ratio_ids)
        )
        parts = zip(
            self.keys, self.tokens, self.labels, self.lengths.tolist(), *frames, strict=True
        )
        return [
            EncodedSample(key, tokens[:length], labels[:length], pixels, positions, ratios)
            for key, tokens, labels, length, pixels, positions, ratios in parts
        ]

    def pin_memory(self) -> MicroBatch:
        """The same batch with its tensors in page-locked memory, lengths, which the host reads, in
        ordinary memory (torch's DataLoader calls it)."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned | {"lengths": self.lengths.clone()})

    def copied(self) -> MicroBatch:
        """The same batch in memory of this process alone: each tensor that comes from a loader
        process keeps a file open, and a step may have thousands."""
        return replace(self, **{name: tensor.clone() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        own = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in own if isinstance(value, Tensor)}


def collate(samples: Sequence[EncodedSample], pad_token_id: int) -> MicroBatch:
    """Stacks samples into one microbatch; S becomes that of the longest."""
    if not samples:
        raise ValueError("collate: no samples")
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.full((len(samples), longest), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(samples), longest), IGNORED_LABEL, dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        labels[row, : len(sample.labels)] = sample.labels
    counts = torch.tensor([len(sample.frames) for sample in samples])
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        lengths=torch.tensor([len(sample.tokens) for sample in samples]),
        # One sample's frames, often hundreds of megabytes, need no copy.
        frames=torch.cat([s.frames for s in samples]) if len(samples) > 1 else samples[0].frames,
        frame_rows=torch.repeat_interleave(torch.arange(len(samples)), counts),
        frame_positions=torch.cat([sample.frame_positions for sample in samples]),
        aspect_ratio_ids=torch.cat([sample.aspect_ratio_ids for sample in samples]),
        keys=[sample.key for sample in samples],
        unlearned=sum((sample.unlearned for sample in samples), Unlearned()),
    )
