"""What tests of the model build from: presets and models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from moss_train.config import ParallelConfig
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import fill
from moss_train.model.groups import Groups
from moss_train.model.kernels import Kernels
from moss_train.model.moss_video import MossVideo
from moss_train.model_config import ModelConfig

PRESETS = Path(__file__).resolve().parents[3] / "conf" / "model"


def preset(name: str, **changes: Any) -> ModelConfig:
    """conf/model/NAME.yaml, with some fields changed."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(_file(name)))
    model = OmegaConf.to_object(merged)
    assert isinstance(model, ModelConfig)
    return replace(model, **changes)


def _file(name: str) -> Path:
    return PRESETS / f"{name}.yaml"


def random_model(
    model: ModelConfig, groups: Groups, kernels: Kernels | None = None, **parallel: Any
) -> MossVideo:
    """A model with seeded weights in which no norm is one, no bias and no gate zero."""
    built = MossVideo(model, ParallelConfig(**parallel), groups, kernels=kernels)
    read = random_reader(model, seed=7)
    generator = torch.Generator().manual_seed(3)

    def uneven(name: str, shape: torch.Size) -> Tensor:
        value = read(name, shape)
        if value.min() == value.max():  # a norm, a bias, a gate
            return value + 0.1 + 0.5 * torch.rand(shape, generator=generator)
        return value * 8

    fill(built, uneven)
    return built
