"""The weights of megatron's distributed checkpoints (`torch_dist`), a tensor at a time.

Such a folder holds `.metadata` (where every tensor's boxes are), `*.distcp` (each box a
`torch.save` at an offset), `common.pt` and `metadata.json`. Reading and writing it needs neither
megatron nor a process group; what is written, megatron loads in any layout.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moss_train.convert.job import HashedFile, MemoryBudget
from moss_train.convert.source import ConversionError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
CONTENT = {  # metadata of our checkpoints' content, also of those that train/checkpoint.py saves
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
    "non_homogeneous_layers": True,
}
EXTRA_STATE = "{}._extra_state/shard_0_1"  # megatron's linear layers ask for one, and ignore it


class WeightFiles:
    """The weights of a checkpoint. `shapes` and `dtypes` have those of every tensor, by our name.

    Raises:
        ConversionError: the folder holds no readable metadata, or boxes that do not fill a tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metadata = _read_metadata(folder / ".metadata")
        self.reader = FileSystemReader(folder)
        self.reader.set_up_storage_reader(self.metadata, True)
        tensors = {
            name: stored
            for name, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self.shapes = {name: stored.size for name, stored in tensors.items()}
        self.dtypes = {name: stored.properties.dtype for name, stored in tensors.items()}
        holes = [
            f"{folder}: the parts of {name} hold {sum(prod(c.sizes) for c in stored.chunks)} of "
            f"{prod(stored.size)} numbers"
            for name, stored in tensors.items()
            if sum(prod(c.sizes) for c in stored.chunks) != prod(stored.size)
        ]
        if holes:
            raise ConversionError("\n".join(holes))

    def read(self, name: str) -> Tensor:
        """A whole tensor, whatever layout saved it."""
        out = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: out}, self.metadata, True)
        try:
            self.reader.read_data(planner.create_local_plan(), planner)
        except Exception as error:  # torch raises all kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConversionError(f"{self.folder}: {name} cannot be read: {reason}") from None
        return out


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`, which torch pickles, and makes nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.core.dist_checkpointing."):
            return type(name, (), {})  # plans, which older versions of megatron leave: not used
        if (module.split(".")[0], name) in (
            ("pathlib", "PosixPath"),
            ("collections", "OrderedDict"),
        ):
            return super().find_class(module, name)
        if module.startswith("torch.distributed.checkpoint."):
            made = super().find_class(module, name)
            if is_dataclass(made) or (isinstance(made, type) and issubclass(made, Enum)):
                return made
        if (module, name) == ("torch.serialization", "_get_layout") or (
            module == "torch" and (name == "Size" or isinstance(getattr(torch, name), torch.dtype))
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(io.BufferedReader(file)).load()  # type: ignore[arg-type]
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # pickle raises all kinds
        raise ConversionError(f"{path}: is not the metadata of a checkpoint: {error}") from None
    if not isinstance(metadata, Metadata):
        raise ConversionError(f"{path}: is not the metadata of a checkpoint")
    for stored in (metadata.storage_data or {}).values():
        if Path(stored.relative_path).name != stored.relative_path:
            raise ConversionError(f"{path}: names {stored.relative_path}, outside of its folder")
    return metadata


@dataclass(frozen=True)
class Box:
    """A part of a tensor to write: where it begins, its sizes, and what gives its numbers."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes on disk."""
        return prod(self.sizes) * self.dtype.itemsize


def write_boxes(
    path: Path, boxes: list[Box], memory: MemoryBudget, on_bytes: Callable[[int], None]
) -> tuple[dict[MetadataIndex, _StorageInfo], str]:
    """Writes a `.distcp` file; returns where each box is, and the file's SHA-256.

    `on_bytes` is called with the size of each box that is written.
    """
    places = {}
    file = HashedFile(path)
    for box in boxes:
        start = file.tell()
        with memory.lend(3 * box.bytes):  # as stored, mapped and cast
            tensor = box.make().contiguous()
            try:
                torch.save(tensor, cast(Any, file))
            except RuntimeError as error:
                raise file.error or error from None
            del tensor
        index = MetadataIndex(box.name, box.offsets)
        places[index] = _StorageInfo(path.name, start, file.tell() - start)
        on_bytes(box.bytes)
    return places, file.close()


def write_extra_states(
    path: Path, layers: list[str]
) -> tuple[dict[MetadataIndex, _StorageInfo], str]:
    """Writes the empty extra states that megatron's linear layers ask for."""
    empty = _saved([None])
    places = {}
    file = HashedFile(path)
    for layer in layers:
        start = file.tell()
        file.write(empty)
        index = MetadataIndex(EXTRA_STATE.format(layer))
        places[index] = _StorageInfo(path.name, start, file.tell() - start)
    return places, file.close()


def write_metadata(
    folder: Path,
    shapes: dict[str, torch.Size],
    boxes: list[Box],
    layers: list[str],
    places: dict[MetadataIndex, _StorageInfo],
) -> None:
    """Writes what makes a folder of `.distcp` files a checkpoint of megatron's."""
    state: dict[str, Any] = {}
    for box in boxes:
        properties = TensorProperties(dtype=box.dtype)
        entry = TensorStorageMetadata(properties, shapes[box.name], [])
        stored = state.setdefault(box.name, entry)
        stored.chunks.append(ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)))
    state |= {EXTRA_STATE.format(layer): BytesStorageMetadata() for layer in layers}
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(Metadata(state_dict_metadata=state, storage_data=places), file)
    (folder / "common.pt").write_bytes(_saved({"content_metadata": CONTENT}))
    (folder / "metadata.json").write_text(json.dumps(FORMAT))


def _saved(value: Any) -> bytes:
    """The bytes of torch.save, which tells of a full disk only when it writes no file itself."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def boxes_of_rows(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    read: Callable[[slice], Tensor],
    largest: int,
    first: int = 0,
) -> Iterator[Box]:
    """Boxes of at most `largest` bytes of `read(rows)`, rows from `first` on of a parameter."""
    if not shape:
        yield Box(name, (), (), dtype, lambda: read(slice(None)))
        return
    row = prod(shape[1:]) * dtype.itemsize
    step = max(1, largest // max(1, row))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        offsets = (first + start, *(0 for _ in shape[1:]))
        sizes = (rows.stop - rows.start, *shape[1:])
        yield Box(name, offsets, sizes, dtype, lambda rows=rows: read(rows))  # type: ignore[misc]
