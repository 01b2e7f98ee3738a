"""A text-only Llama as the start of a model: its layers, between cross-attention layers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moss_train.config import ConfigError, ModelConfig
from moss_train.convert.hf_config import text_config_from_llama
from moss_train.convert.mapping import TEXT
from moss_train.convert.weights import Reader, random_reader
from moss_train.model.lora import is_adapter

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def check_llama(folder: Path, model: ModelConfig) -> Iterator[str]:
    """A line for each field of `model.text` that the text model in `folder` has otherwise."""
    wanted = text_config_from_llama(folder, model.text)
    mine = asdict(model.text)
    for key, value in asdict(wanted).items():
        # Without scaling (factor 1) its other numbers say nothing.
        plain = key == "rope_scaling" and value["factor"] == mine[key]["factor"] == 1
        if mine[key] != value and not plain:
            yield f"model.text.{key}={mine[key]}: the text model {folder} needs {value}"
    _files(folder)


def initial_reader(model: ModelConfig, seed: int) -> Reader:
    """The weights that a run starts from: drawn, or grown onto `model.init.from_llama`."""
    drawn = random_reader(model, seed)
    if model.init.from_llama is None:
        return drawn
    return llama_reader(Path(model.init.from_llama), model, drawn)


def llama_reader(folder: Path, model: ModelConfig, others: Reader) -> Reader:
    """Reads our HF names from a text-only Llama; what it does not have comes from `others`.

    The rows of the embedding beyond the vocabulary are `others`', and gates are 0, so that the
    model predicts for any text, with frames or without, what the text model does.
    """
    files, text = _files(folder), model.text
    inserted = sorted(text.cross_attention_layers)

    def read(name: str, shape: torch.Size) -> Tensor:
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            return torch.zeros(shape)
        theirs = _their_name(name, inserted)
        if theirs is None:
            return others(name, shape)
        if theirs == "lm_head.weight" and theirs not in files:
            theirs = "model.embed_tokens.weight"  # tied
        tensor = _load(files, theirs, folder)
        extra = shape[0] - len(tensor)
        if theirs == "model.embed_tokens.weight" and extra > 0:
            tensor = torch.cat((tensor, others(name, shape)[-extra:].to(tensor.dtype)))
        return tensor

    return read


def _their_name(name: str, inserted: list[int]) -> str | None:
    """A text model's name of one of ours, None for what it does not have."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    if not name.startswith(TEXT) or is_adapter(name):
        return None
    name = name.removeprefix(TEXT)
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if layer is None:
        return f"model.{name}"
    index = int(layer[1])
    if index in inserted:
        return None
    return f"model.layers.{index - sum(i < index for i in inserted)}.{layer[2]}"


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    try:
        if (folder / INDEX).is_file():
            places = json.loads((folder / INDEX).read_text())["weight_map"]
            return {name: folder / file for name, file in places.items()}
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(
            [f"model.init.from_llama={folder}: cannot read its safetensors files: {error}"]
        ) from None


def _load(files: dict[str, Path], name: str, folder: Path) -> Tensor:
    if name not in files:
        raise ConfigError([f"model.init.from_llama={folder}: has no tensor {name}"])
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name)
