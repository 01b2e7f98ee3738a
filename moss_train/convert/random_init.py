"""Weights to start from: each HF tensor drawn from a stream of its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from moss_train.model_config import ModelConfig

Reader = Callable[[str, torch.Size], Tensor]


def random_reader(model: ModelConfig, seed: int) -> Reader:
    """Draws each HF tensor from a stream of its own, seeded by its name.

    A rank draws the whole tensor and keeps its slice, so that the weights do not depend on the
    parallel layout, nor on the order in which they are made.
    """

    def read(name: str, shape: torch.Size) -> Tensor:
        constant = _constant(model, name)
        if constant is not None:
            return torch.full(shape, constant)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if name.endswith("lora_a"):
            return torch.randn(shape, generator=generator) * shape[1] ** -0.5
        return torch.randn(shape, generator=generator) * _std(model, name)

    return read


def _std(model: ModelConfig, name: str) -> float:
    """Standard deviation of a parameter that is drawn.

    What adds to the residual stream is drawn smaller, so that the sum over the layers is not (as in
    GPT-2: std / sqrt(2 x layers)).
    """
    if name.endswith("embed_tokens.weight"):
        return model.init.embedding or model.init.std
    if name.endswith("gated_positional_embedding.embedding"):
        return model.init.position or model.init.std
    if name.endswith("class_embedding"):
        return model.vision.hidden_size**-0.5
    if name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight")):
        vision = name.startswith("vision_model.")
        layers = model.vision.num_layers if vision else model.text.num_layers
        return model.init.std / math.sqrt(2 * layers)
    return model.init.std


def _constant(model: ModelConfig, name: str) -> float | None:
    """Initial value of the parameters that are not drawn, as transformers' Mllama has them."""
    if name.endswith(("bias", "lora_b")):
        return 0.0
    if "norm" in name.split(".")[-2] or "layernorm" in name:
        return 1.0
    if "cross_attn_" in name and name.endswith("gate"):
        return model.init.gate
    if name.endswith(("gate_attn", "gate_ffn")):
        return math.pi / 4
    return 0.0 if name.endswith("gate") else None
