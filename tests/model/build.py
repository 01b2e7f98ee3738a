"""What tests of the model build from: presets, models, and the frames of a batch in HF's form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from moss_train.config import ModelConfig, ParallelConfig
from moss_train.convert.weights import fill, random_reader
from moss_train.model.frames import NEVER, FrameBatch, plan_frames
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.groups import Groups

PRESETS = Path(__file__).resolve().parents[2] / "conf" / "model"


def preset(name: str, **changes: Any) -> ModelConfig:
    """conf/model/NAME.yaml, with some fields changed."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(_file(name)))
    model = OmegaConf.to_object(merged)
    assert isinstance(model, ModelConfig)
    return replace(model, **changes)


def _file(name: str) -> Path:
    return PRESETS / f"{name}.yaml"


def random_model(model: ModelConfig, groups: Groups, **parallel: Any) -> MossVideo:
    """A model with seeded weights in which no norm is one, no bias and no gate zero."""
    built = MossVideo(model, ParallelConfig(**parallel), groups)
    read = random_reader(model, seed=7)
    generator = torch.Generator().manual_seed(3)

    def uneven(name: str, shape: torch.Size) -> Tensor:
        value = read(name, shape)
        if value.min() == value.max():  # a norm, a bias, a gate
            return value + 0.1 + 0.5 * torch.rand(shape, generator=generator)
        return value * 8

    fill(built, uneven)
    return built


def frames_of_batch(
    positions: Tensor, mask: Tensor, lengths: list[int], attend_all: bool, total: int | None = None
) -> FrameBatch:
    """FrameBatch of a batch in HF's form, its rows packed one after the other.

    Args:
        positions: token index of each frame's mark `[B, F]`.
        mask: cross_attention_mask `[B, S, F, T]`; a frame that no token sees is padding.
        lengths: tokens of each row without padding.
        attend_all: as in plan_frames.
        total: length of the packed rows with padding; None: there is none.
    """
    mask = mask.bool()
    batch, length, count, max_tiles = mask.shape
    sees = mask.any(3)  # [B, S, F]
    padding = ~sees.any(1)  # [B, F]
    first = sees.int().argmax(1).masked_fill(padding, NEVER)
    last = length - sees.flip(1).int().argmax(1)
    return plan_frames(
        torch.arange(batch).repeat_interleave(count),
        positions.flatten(),
        lengths,
        sum(lengths) if total is None else total,
        visible_from=first.flatten(),
        visible_until=last.masked_fill(padding, NEVER).flatten(),
        tiles=mask.any(1).sum(2).flatten(),
        max_tiles=max_tiles,
        attend_all=attend_all,
    )
