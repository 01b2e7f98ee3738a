"""Weights from safetensors to where they live, by several threads, and no more than a rank needs.

The model is made without memory (`meta`), cut to the rank's slice, and each of its parameters is
read from its place in the mapped file to the device. So a rank of eight reads an eighth of the
file, and the host holds no copy of the model on its way to a GPU. On a CPU weights that need no
other dtype stay in the mapped file, which processes share.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from inference.engine.tensor_parallel import GatheredLinear, RowLinear, shard
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.modeling_moss_video import OLD_NAMES, MossVideoForConditionalGeneration

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
THREADS = 8
_CUT = (RowLinear, GatheredLinear)


@dataclass
class Reading:
    """A model, and the names that do not fit: of its parameters that no file has, and of tensors
    that are none of them."""

    model: MossVideoForConditionalGeneration
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def has_safetensors(folder: Path) -> bool:
    """Else the folder's weights are in a form that only transformers reads."""
    return (folder / INDEX).is_file() or (folder / WHOLE).is_file()


def read_model(
    folder: Path,
    config: MossVideoConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> Reading:
    """The model of a folder with safetensors, on the device; of several ranks, this one's slice.

    Args:
        dtype: of all parameters; None: that of the config, or of the first weight.

    Raises:
        ValueError: a tensor has another shape than the model's, or the ranks cannot share it.
        OSError, SafetensorError: a file cannot be read.
    """
    files = {name: file for file in _files(folder) for name in _names(file)}
    if dtype is None:
        dtype = config.dtype or _first_dtype(files)
    with torch.device("meta"):
        model = MossVideoForConditionalGeneration(config)
    if ranks > 1:
        shard(model, rank, ranks)
    wanted = dict(_parameters(model))
    known = {_today(name): name for name in files}
    found = Reading(
        model,
        [name for name in wanted if name not in known],
        [old for new, old in known.items() if new not in wanted],
    )
    if not found.missing:
        jobs = {known[name]: target for name, target in wanted.items()}
        _fill(jobs, files, dtype, device, (rank, ranks))
    return found


Target = tuple[nn.Module, str]  # a module and its parameter's name


def _parameters(model: nn.Module) -> Iterator[tuple[str, Target]]:
    """By their names in a folder, in which no layer is cut."""
    cut = {f"{p}.linear": p for p, m in model.named_modules() if isinstance(m, _CUT)}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield f"{cut.get(path, path)}.{name}", (module, name)


def _today(name: str) -> str:
    """A tensor's name in today's layout."""
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def _files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / WHOLE]
    index = json.loads((folder / INDEX).read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _first_dtype(files: Mapping[str, Path]) -> torch.dtype:
    for name, file in files.items():
        with safe_open(file, framework="pt") as opened:
            dtype: torch.dtype = opened.get_slice(name)[:0].dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.get_default_dtype()


def _fill(
    jobs: Mapping[str, Target],
    files: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    place: tuple[int, int],
) -> None:
    """Reads each tensor to its parameter."""

    def read(name: str) -> None:
        module, own = jobs[name]
        shape = module.get_parameter(own).shape
        with safe_open(files[name], framework="pt") as opened:
            part = _part(name, opened, shape, *place)
            tensor = part.to(device, dtype).contiguous()
        setattr(module, own, nn.Parameter(tensor, requires_grad=False))

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read, [name for name in files if name in jobs]):
            pass


def _part(name: str, opened: Any, shape: torch.Size, rank: int, ranks: int) -> Tensor:
    """This rank's part: a layer is cut along the dimension in which it is smaller."""
    stored = opened.get_slice(name)
    whole = tuple(stored.get_shape())
    cut = [n for n, (a, b) in enumerate(zip(whole, shape, strict=False)) if a != b]
    fits = ranks > 1 and len(cut) == 1 and whole[cut[0]] == ranks * shape[cut[0]]
    if len(whole) != len(shape) or (cut and not fits):
        raise ValueError(f"{name} is {list(whole)}, the model's is {list(shape)}")
    if cut:
        where = slice(rank * shape[cut[0]], (rank + 1) * shape[cut[0]])
        part: Tensor = stored[(slice(None),) * cut[0] + (where,)]
    else:
        part = opened.get_tensor(name)
    return part
