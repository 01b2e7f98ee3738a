"""A model's numbers on one kind of attention against those on sdpa."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moss_train.model.frame_plan import plan_frames
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from tests.moss_train.model.build import preset, random_model

TINY = preset("tiny")
# A sequence that watches frames come, short ones beside it, and one that sees all at its start.
LENGTHS = [40, 9, 17, 300]
IMAGES = ((0, 3), (0, 11), (0, 12), (0, 30), (1, 2), (3, 0), (3, 1), (3, 2))
PACKED = LENGTHS, IMAGES
DENSE = [300], ((0, 0), (0, 1), (0, 2))


def losses(model: MossVideo, layout: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits `[S, V]` of a microbatch, and the gradients of their mean square."""
    lengths, images = layout
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(20, 320, (sum(lengths),), generator=generator)
    rows, positions = (torch.tensor(x) for x in zip(*images, strict=True))
    tokens[torch.tensor(lengths).cumsum(0)[rows] - torch.tensor(lengths)[rows] + positions] = 320
    pixels = torch.randn(len(images), 1, 3, 56, 56, generator=generator)
    frames = plan_frames(rows, positions, lengths, len(tokens))
    frames.states = model.encoder(pixels, torch.ones(len(images), dtype=torch.long))
    logits = model.chunks[0](PackedText(tokens, lengths), frames)
    parameters = [p for _, p in sorted(model.named_parameters())]
    gradients = torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)
    return logits.detach(), [g for g in gradients if g is not None]


def compare(groups: Any, kind: str, layout: Any) -> None:
    """fp32 numbers of a kind against sdpa's: equal but for the order in which they are added."""
    model = replace(TINY, dtype="fp32")
    wanted, right = losses(random_model(model, groups), layout)
    got, ours = losses(random_model(replace(model, attention=kind), groups), layout)
    assert wanted.std() > 0.1
    loss, right_loss = got.square().mean(), wanted.square().mean()
    assert abs(loss - right_loss) <= 1e-6 * right_loss
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(ours) == len(right) > 50
    for one, other in zip(ours, right, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1e-3)
