"""LoRA on the decoder's linear layers: which layers, and what it adds to their weights."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import Tensor

from moss_train.config import AdapterConfig
from moss_train.model.linear import ColumnLinear, RowLinear

if TYPE_CHECKING:
    from moss_train.model.moss_video import MossVideo

PARAMETERS = "*.lora_?"  # the names of what adapters add


def is_adapter(name: str) -> bool:
    """True for the name of a parameter that an adapter added."""
    return fnmatchcase(name, PARAMETERS)


def adapt(model: MossVideo, adapter: AdapterConfig) -> None:
    """Adds A and B (still to be filled) to the layers that `adapter.target` matches."""
    for name, layer in _linear_layers(model):
        if any(fnmatchcase(name, pattern) for pattern in adapter.target):
            layer.adapt(adapter.rank, adapter.alpha / adapter.rank)


def merge(model: MossVideo) -> None:
    """Adds what the adapters do to the weights for good, and drops the adapters."""
    for _, layer in adapted_layers(model):
        layer.merge()


def low_rank_updates(model: MossVideo) -> dict[str, Tensor]:
    """What adapters add to each weight (to this rank's part of it), by the weight's name."""
    return {f"{n}.weight": layer.low_rank_update().detach() for n, layer in adapted_layers(model)}


def adapted_layers(model: MossVideo) -> Iterator[tuple[str, ColumnLinear | RowLinear]]:
    """This rank's layers that have an adapter, by name."""
    return ((n, layer) for n, layer in _linear_layers(model) if layer.lora_a is not None)


def _linear_layers(model: MossVideo) -> Iterator[tuple[str, ColumnLinear | RowLinear]]:
    for chunk in model.chunks:
        for name, module in chunk.layers.named_modules(prefix="decoder.layers"):
            if isinstance(module, ColumnLinear | RowLinear):
                yield name, module
