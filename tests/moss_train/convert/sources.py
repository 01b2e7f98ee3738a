"""Checkpoints in Hugging Face's form, as transformers and others write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from tests.golden.make_mllama import CONFIG

WEIGHTS = Path(__file__).resolve().parents[2] / "golden" / "mllama.safetensors"


def mllama_weights() -> dict[str, Tensor]:
    """The golden Mllama's, under the names of transformers 4."""
    tensors = load_file(WEIGHTS)
    return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}


def save_folder(
    folder: Path, weights: dict[str, Tensor], config: dict[str, Any] | None = None
) -> Path:
    """One file of weights, and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return folder


def save_by_transformers(folder: Path, shard: str = "60KB") -> Path:
    """The golden Mllama as transformers' own class saves it: in several files."""
    plain = save_folder(folder / "plain", mllama_weights())
    MllamaForConditionalGeneration.from_pretrained(plain).save_pretrained(
        folder, max_shard_size=shard
    )
    return folder


def as_transformers_5(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that transformers 5's modules have."""

    def rename(name: str) -> str:
        if name.startswith("language_model.lm_head."):
            return name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.")

    return {rename(name): tensor for name, tensor in weights.items()}


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, by the library's reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that are not in both, and of tensors that are not the same bits."""
    return sorted(one.keys() ^ other.keys()) + [
        name
        for name in one.keys() & other.keys()
        if one[name].dtype != other[name].dtype
        or one[name].shape != other[name].shape
        or not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
    ]
