"""Which attention an engine runs on: data_pipeline/attention_kinds.py says what each can do."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from data_pipeline.attention_kinds import (
    FRAMES,
    INFERENCE,
    NPU,
    TEXT,
    TOWER,
    AttentionNeeds,
    able,
    kinds_of,
    refusals,
)
from inference.engine.attend import Attend, Sdpa, attend_by
from inference.engine.attend_flash import FlashAttention
from inference.engine.attend_npu import NpuAttention
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

CHOICES = ("auto", *kinds_of(INFERENCE))
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def set_up(model: MossVideoForConditionalGeneration, name: str) -> Attend:
    """The attention that one of CHOICES stands for; the model's tower attends by it from now on.

    Raises:
        ValueError: it cannot be had; names what can.
    """
    weight = model.model.language_model.embed_tokens.weight
    made = make(choose(name, weight.device, weight.dtype, *needs_of(model.config)))
    attend_by(model, made)
    return made


def needs_of(config: MossVideoConfig) -> tuple[dict[str, int], str]:
    """Sizes of a head by place, and what needs a mask, as `choose` takes them."""
    text, vision = config.text_config, config.vision_config
    size = text.hidden_size // text.num_attention_heads
    tower = vision.hidden_size // vision.attention_heads
    mask = "" if config.full_attention else "a tower of full_attention=false"
    return {TEXT: size, FRAMES: size, TOWER: tower}, mask


def choose(
    name: str, device: torch.device, dtype: torch.dtype, heads: Mapping[str, int], mask: str
) -> str:
    """The kind that one of CHOICES stands for.

    Args:
        heads: size of a head, by place. mask: as `AttentionNeeds`'s.

    Raises:
        ValueError: it cannot be had; names what can.
    """
    needs = AttentionNeeds(INFERENCE, device.type, DTYPES.get(dtype, str(dtype)), heads, mask)
    if name == "auto":
        return NPU if NPU in able(needs) else "sdpa"
    for refusal in refusals("attention", name, needs):
        raise ValueError(refusal)
    return name


def make(kind: str) -> Attend:
    """The attention of this kind.

    Raises:
        ValueError: its package cannot be imported.
    """
    try:
        if kind == NPU:
            return NpuAttention()
        if kind == "flash":
            return FlashAttention()
    except ImportError as error:
        raise ValueError(f"attention={kind}: {error}") from None
    return Sdpa()
