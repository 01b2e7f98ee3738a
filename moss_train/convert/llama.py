"""A text-only Llama as the start of a model: its layers, between cross-attention layers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from moss_train.config import ConfigError
from moss_train.convert.hf_config import text_config_from_llama, ties_embeddings
from moss_train.convert.random_init import Reader, random_reader
from moss_train.convert.source import ConversionError, HfFolder, problems_of
from moss_train.log import log
from moss_train.model.hf_mapping import TEXT, hf_shapes, table
from moss_train.model_config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # of a text model
COMPARED = 4096  # rows that are compared at once


def check_llama(folder: Path, model: ModelConfig) -> Iterator[str]:
    """A line for each field of `model.text` that the text model in `folder` has otherwise."""
    expected = text_config_from_llama(folder, model.text)
    mine = asdict(model.text)
    for key, value in asdict(expected).items():
        # Without scaling (factor 1) its other numbers say nothing.
        plain = key == "rope_scaling" and value["factor"] == mine[key]["factor"] == 1
        if mine[key] != value and not plain:
            yield f"model.text.{key}={mine[key]}: the text model {folder} needs {value}"
    source = _open(folder)
    for problem in problems_of(source, text_shapes(replace(model, text=expected))):
        yield f"model.init.from_llama={folder}: {problem}"
    if os.environ.get("RANK", "0") == "0":
        for note in source.notes:
            log.warning("model.init.from_llama=%s: %s", folder, note)


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
    source = _open(folder)

    def read_theirs(name: str, rows: slice) -> Tensor:
        if name not in source.tensors:
            raise ConfigError([f"model.init.from_llama={folder}: has no tensor {name}"])
        return source.read(name, rows)

    read = grown_reader(read_theirs, model, others)
    return lambda name, shape: read(name, shape, slice(None))


def open_llama(folder: Path, allow_pickle: bool = False) -> HfFolder:
    """The weights of a text model; where config.json ties embedding and head, one is the other.

    Raises:
        ConversionError, ConfigError: as HfFolder, and as `ties_embeddings`.
    """
    source = HfFolder(folder, text_name, allow_pickle)
    if not ties_embeddings(folder):
        return source
    tensors = source.tensors
    for absent, present in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
        if present in tensors:
            tensors.setdefault(absent, tensors[present])
    if HEAD in tensors and not _equal(source, HEAD, EMBEDDING):
        source.notes.append(
            f"tie_word_embeddings is true, but the file has another {HEAD}: it is taken, as "
            "transformers takes it"
        )
    return source


def text_name(name: str) -> str:
    """The name in a text model of a tensor that was saved without its output head, or as the text
    part of a larger model."""
    return re.sub(r"^(model\.language_model\.)?(?=(embed_tokens|layers|norm)\.)", "model.", name)


def _equal(source: HfFolder, one: str, other: str) -> bool:
    a, b = source.tensors[one], source.tensors[other]
    if a is b or a.shape != b.shape or not a.shape:
        return a.shape == b.shape
    parts = [slice(start, start + COMPARED) for start in range(0, a.shape[0], COMPARED)]
    return all(torch.equal(source.read(one, rows), source.read(other, rows)) for rows in parts)


def grown_reader(
    theirs: Callable[[str, slice], Tensor], model: ModelConfig, others: Reader
) -> Callable[[str, torch.Size, slice], Tensor]:
    """A reader like `llama_reader`'s, of some rows of a tensor; `theirs` reads the text model's."""
    inserted = sorted(model.text.cross_attention_layers)

    def read(name: str, shape: torch.Size, rows: slice) -> Tensor:
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            return torch.zeros(shape)[rows]
        their_name = _their_name(name, inserted)
        if their_name is None:
            return others(name, shape)[rows]
        tensor = theirs(their_name, rows)
        extra = len(range(*rows.indices(shape[0]))) - len(tensor)
        if their_name == EMBEDDING and extra > 0:
            new = others(name, shape)[rows][-extra:]
            tensor = torch.cat((tensor, new.to(tensor.dtype)))
        return tensor

    return read


def text_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of the text-only Llama's tensors that `model` grows from."""
    inserted = sorted(model.text.cross_attention_layers)
    shapes = {}
    for rule in table(model):
        for name, shape in hf_shapes(model, rule).items():
            theirs = _their_name(name, inserted)
            if theirs is not None:
                shapes[theirs] = shape
    hidden = model.text.hidden_size
    shapes[EMBEDDING] = torch.Size([model.text.vocab_size, hidden])
    return shapes


def _their_name(name: str, inserted: list[int]) -> str | None:
    """A text model's name of one of ours, None for what it does not have."""
    if name == "language_model.lm_head.weight":
        return HEAD
    if not name.startswith(TEXT) or name.endswith(("lora_a", "lora_b")):
        return None
    name = name.removeprefix(TEXT)
    layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    if layer is None:
        return f"model.{name}"
    index = int(layer[1])
    if index in inserted:
        return None
    return f"model.layers.{index - sum(i < index for i in inserted)}.{layer[2]}"


def _open(folder: Path) -> HfFolder:
    try:
        return open_llama(folder)
    except ConversionError as error:
        raise ConfigError(
            [f"model.init.from_llama={folder}: {str(error).removeprefix(f'{folder}: ')}"]
        ) from None
