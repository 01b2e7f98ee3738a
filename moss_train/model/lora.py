"""LoRA on the decoder's linear layers: which layers, and what it adds to their weights.

`layers` are those of a rank's decoder chunks (`MossVideo.layers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import Tensor, nn

from moss_train.config import AdapterConfig
from moss_train.model.linear import ColumnLinear, RowLinear

PARAMETERS = "*.lora_?"  # the names of what adapters add


def is_adapter(name: str) -> bool:
    """True for the name of a parameter that an adapter added."""
    return fnmatchcase(name, PARAMETERS)


def adapt(layers: Iterable[nn.ModuleDict], adapter: AdapterConfig) -> None:
    """Adds A and B (still to be filled) to the linear layers that `adapter.target` matches."""
    for name, layer in _linear_layers(layers):
        if any(fnmatchcase(name, pattern) for pattern in adapter.target):
            layer.adapt(adapter.rank, adapter.alpha / adapter.rank)


def merge(layers: Iterable[nn.ModuleDict]) -> None:
    """Adds the adapters' updates to the weights for good, and drops the adapters."""
    for _, layer in _adapted_layers(layers):
        layer.merge()


def low_rank_updates(layers: Iterable[nn.ModuleDict]) -> dict[str, Tensor]:
    """What adapters add to each weight (to this rank's part of it), by the weight's name."""
    adapted = _adapted_layers(layers)
    return {f"{name}.weight": layer.low_rank_update().detach() for name, layer in adapted}


def _adapted_layers(
    layers: Iterable[nn.ModuleDict],
) -> Iterator[tuple[str, ColumnLinear | RowLinear]]:
    """The linear layers that have an adapter, by name."""
    return ((name, layer) for name, layer in _linear_layers(layers) if layer.lora_a is not None)


def _linear_layers(
    layers: Iterable[nn.ModuleDict],
) -> Iterator[tuple[str, ColumnLinear | RowLinear]]:
    for chunk in layers:
        for name, module in chunk.named_modules(prefix="decoder.layers"):
            if isinstance(module, ColumnLinear | RowLinear):
                yield name, module
