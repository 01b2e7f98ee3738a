"""Tensor-parallel weights: each rank's slice of the linear layers, and where slices are joined.

A rank holds some heads and a part of the MLP of every layer, of the decoder and of the vision
tower, and a part of the output head. Partial results are summed where they join the residual
stream (`RowLinear`); logits are gathered (`GatheredLinear`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration


class RowLinear(nn.Module):
    """A slice of the input's columns; the sum over ranks is the whole product."""

    def __init__(self, whole: nn.Linear, rank: int, size: int):
        super().__init__()
        self.linear = _linear(whole.weight.chunk(size, 1)[rank])
        self.bias = whole.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        dist.all_reduce(out)
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):
    """A slice of the output's rows; all ranks get all of them."""

    def __init__(self, whole: nn.Linear, rank: int, size: int):
        super().__init__()
        self.size = size
        self.linear = _linear(whole.weight.chunk(size, 0)[rank])

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        parts = [torch.empty_like(out) for _ in range(self.size)]
        dist.all_gather(parts, out.contiguous())
        return torch.cat(parts, dim=-1)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def shard(model: MossVideoForConditionalGeneration, rank: int, size: int) -> None:
    """Cuts a model to this rank's slice, in place.

    Raises:
        ValueError: names a size of the config that `size` ranks cannot share.
    """
    check_divisible(model.config, size)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            if name in ("o_proj", "down_proj", "fc2"):
                setattr(module, name, RowLinear(child, rank, size))
            elif name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1"):
                bias = None if child.bias is None else child.bias.chunk(size)[rank]
                setattr(module, name, _linear(child.weight.chunk(size, 0)[rank], bias))
    head = model.lm_head
    assert isinstance(head, nn.Linear)
    model.lm_head = GatheredLinear(head, rank, size)


def check_divisible(config: Any, size: int) -> None:
    """What is shared among ranks must be a multiple of their number."""
    text, vision = config.text_config, config.vision_config
    for section, name in (
        (text, "num_attention_heads"),
        (text, "num_key_value_heads"),
        (text, "intermediate_size"),
        (text, "vocab_size"),
        (vision, "attention_heads"),
        (vision, "intermediate_size"),
    ):
        value = getattr(section, name)
        if value % size:
            where = "text_config" if section is text else "vision_config"
            raise ValueError(
                f"{size} ranks cannot share {where}.{name}={value}: start a number of processes "
                "that divides it"
            )
