"""Weights from safetensors to where they live, by several threads, and no more than a rank needs.

The model is made without memory (`meta`), cut to the rank's slice, and each of its parameters is
read from its place in the mapped file to the device, through a ring of page-locked buffers
(staging.py). So a rank of eight reads an eighth of the file, and the host holds no copy of the
model on its way to a GPU. On a CPU weights that need no other dtype stay in the mapped file, which
processes share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data_pipeline.cgroups import cores
from data_pipeline.files import NOT_FETCHED, is_lfs_pointer
from inference.engine.staging import copy_all, works
from inference.engine.tensor_parallel import GatheredLinear, RowLinear, shard
from inference.hf.configuration_moss_video import MossVideoConfig
from inference.hf.model_moss_video import OLD_NAMES
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
THREADS = 8  # where weights do not go through the ring
_CUT = (RowLinear, GatheredLinear)


@dataclass
class Reading:
    """A model, and the names that do not fit: of its parameters that no file has, and of tensors
    that are none of them."""

    model: MossVideoForConditionalGeneration
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def has_safetensors(folder: Path) -> bool:
    """Whether the folder's weights are in safetensors; else only transformers reads them."""
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
        ValueError: a tensor has another shape than the model's or is there twice, the ranks cannot
            share it, or the folder holds two states of the weights.
        OSError, SafetensorError: a file cannot be read.
    """
    with torch.device("meta"):
        model = MossVideoForConditionalGeneration(config)
    if ranks > 1:
        shard(model, rank, ranks)
    parameters = dict(_parameters(model))
    with ExitStack() as stack:
        files = _opened(folder, stack)
        stored_names = _by_today_names(folder, files)
        found = Reading(
            model,
            [name for name in parameters if name not in stored_names],
            [old for new, old in stored_names.items() if new not in parameters],
        )
        if not found.missing:
            jobs = {stored_names[name]: target for name, target in parameters.items()}
            kind = dtype or config.dtype or _first_dtype(files)
            try:
                _fill(jobs, files, kind, device, (rank, ranks))
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
    return found


Target = tuple[nn.Module, str]  # a module and its parameter's name


def _parameters(model: nn.Module) -> Iterator[tuple[str, Target]]:
    """All parameters by their names in a folder, in which no layer is cut."""
    cut = {f"{p}.linear": p for p, m in model.named_modules() if isinstance(m, _CUT)}
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield f"{cut.get(path, path)}.{name}", (module, name)


def today_name(name: str) -> str:
    """A tensor's name in today's layout."""
    for old, new in OLD_NAMES.items():
        name = re.sub(old, new, name)
    return name


def _files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / WHOLE]
    try:
        named = {
            str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: cannot be read: {error!r}") from None
    if (folder / WHOLE).is_file() and WHOLE not in named:  # which transformers would read
        raise ValueError(
            f"{folder}: holds {WHOLE} and {INDEX}, whose files are others: remove the weights that "
            "are not the model's"
        )
    return [folder / name for name in sorted(named)]


def _opened(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Each tensor's file, opened until the end of `stack`."""
    files: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    for path in _files(folder):
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            damaged = f"is damaged or cut short ({error}): fetch it again"
            what = NOT_FETCHED if is_lfs_pointer(path) else damaged
            raise SafetensorError(f"{path.name} {what}") from None
        for name in opened.keys():  # noqa: SIM118 - it is not a mapping
            if name in paths:
                both = f"{paths[name].name} and {path.name}"
                raise ValueError(f"{folder}: {both} hold {name}: fetch both again")
            files[name], paths[name] = opened, path
    return files


def _by_today_names(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The names of tensors by those of today's layout."""
    names: dict[str, str] = {}
    for name in files:
        other = names.setdefault(today_name(name), name)
        if other != name:
            raise ValueError(
                f"{folder}: holds {other} and {name}, which are one tensor: remove the one that "
                "is not the model's"
            )
    return names


def _first_dtype(files: Mapping[str, Any]) -> torch.dtype:
    for name, opened in files.items():
        dtype: torch.dtype = opened.get_slice(name)[:0].dtype
        if dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    return torch.get_default_dtype()


def _fill(
    jobs: Mapping[str, Target],
    files: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    place: tuple[int, int],
) -> None:
    """Reads each tensor to its parameter. files: by tensor, opened."""
    names = [name for name in files if name in jobs]

    def part(name: str) -> Tensor:
        module, own = jobs[name]
        return _part(name, files[name], module.get_parameter(own).shape, *place)

    def put(name: str, tensor: Tensor) -> None:
        module, own = jobs[name]
        setattr(module, own, nn.Parameter(tensor, requires_grad=False))

    def made() -> Iterator[tuple[Tensor, Tensor]]:
        for name in names:
            source = part(name)
            target = torch.empty(source.shape, dtype=dtype, device=device)
            put(name, target)
            yield source, target

    if works(device):
        copy_all(made(), device)
        return
    with ThreadPoolExecutor(min(THREADS, cores())) as pool:
        for _ in pool.map(lambda name: put(name, part(name).to(device, dtype).contiguous()), names):
            pass


def _part(name: str, opened: Any, shape: torch.Size, rank: int, ranks: int) -> Tensor:
    """This rank's part of a tensor: a layer is cut along the dimension in which it is smaller."""
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
