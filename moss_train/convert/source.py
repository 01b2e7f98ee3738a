"""Reads a folder in Hugging Face's form, which is not trusted, a tensor at a time.

Weights are read from safetensors. Nothing is unpickled unless that is allowed, and then by torch's
reader of weights alone. Files are those of the folder: an index cannot point out of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class ConversionError(ValueError):
    """Something cannot be converted; the text names the file or tensor, and what to do."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: where, under which name, and what it is."""

    file: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


class HfFolder:
    """The weights of a folder. `tensors` maps names (normalized, see `rename`) to what is stored.

    Raises:
        ConversionError: files are missing, damaged, outside of the folder, or do not hold what the
            index says; each line names one.
    """

    def __init__(
        self, folder: Path, rename: Callable[[str], str] = str, allow_pickle: bool = False
    ):
        self.folder = folder
        index, files = _files(folder, allow_pickle)
        self.pickled = {path: _unpickle(path) for path in files if path.suffix == ".bin"}
        tensors: dict[str, Stored] = {}
        problems = []
        for path in files:
            try:
                for stored in self._read_header(path):
                    other = tensors.setdefault(rename(stored.name), stored)
                    if other is not stored:
                        problems.append(f"{path}: {stored.name} is in {other.file.name}, too")
            except SafetensorError as error:
                problems.append(f"{path}: damaged or cut short ({error}): fetch it again")
        if index is not None and not problems:
            problems += _disagreements(folder, index, tensors.values())
        if problems:
            raise ConversionError("\n".join(problems))
        self.tensors = tensors

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Every dtype that a weight has."""
        return {stored.dtype for stored in self.tensors.values()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """`rows` (of dimension 0) of one tensor, as stored. Nothing else is read."""
        stored = self.tensors[name]
        if stored.file in self.pickled:
            return self.pickled[stored.file][stored.name][rows]
        # Opened anew: what is mapped counts as this process's memory until the file is closed.
        with safe_open(stored.file, framework="pt") as file:
            if not stored.shape:
                return file.get_tensor(stored.name).clone()
            return file.get_slice(stored.name)[rows].clone()

    def _read_header(self, path: Path) -> list[Stored]:
        if path in self.pickled:
            items = self.pickled[path].items()
            return [Stored(path, name, tensor.shape, tensor.dtype) for name, tensor in items]
        headers = []
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is not a dict)
                part = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise SafetensorError(f"{name} has dtype {part.get_dtype()}, which is unknown")
                headers.append(Stored(path, name, torch.Size(part.get_shape()), dtype))
        return headers


def read_json(path: Path) -> dict:
    """A JSON object of a file. Raises ConversionError that names it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConversionError(f"{path}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: holds no mapping")
    return values


def _files(folder: Path, allow_pickle: bool) -> tuple[dict[str, str] | None, list[Path]]:
    """The index (name -> file), if there is one, and the files of weights."""
    if not folder.is_dir():
        raise ConversionError(f"{folder}: is not a folder")
    names = [SAFE, PICKLED] if allow_pickle else [SAFE]
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_index(folder, index)
        if (folder / name).is_file():
            return None, [folder / name]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not allow_pickle:
        raise ConversionError(
            f"{folder}: its weights are pickled ({pickled[0]}), which can run code: "
            "get the safetensors, or use torch's reader of weights alone (--allow-pickle)"
        )
    raise ConversionError(f"{folder}: holds neither {SAFE} nor {SAFE}.index.json")


def _read_index(folder: Path, index: Path) -> tuple[dict[str, str], list[Path]]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ConversionError(f"{index}: weight_map does not map names of tensors to files")
    problems = []
    for name in sorted(set(places.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            problems.append(f"{index}: names {name}: weights must be files of this folder")
        elif Path(name).suffix not in (".safetensors", index.name.split(".")[1]):
            problems.append(f"{index}: names {name}, which is of another kind than the index")
        elif not (folder / name).is_file():
            problems.append(f"{index}: names {name}, which is not there: fetch it")
    if problems:
        raise ConversionError("\n".join(problems))
    return places, [folder / name for name in sorted(set(places.values()))]


def _disagreements(
    folder: Path, index: Mapping[str, str], tensors: Iterable[Stored]
) -> Iterable[str]:
    there = {stored.name: stored.file.name for stored in tensors}
    for name, file in index.items():
        if there.get(name) != file:
            yield f"{folder}: the index says that {file} holds {name}, which it does not"
    for name in there.keys() - index.keys():
        yield f"{folder / there[name]}: holds {name}, which the index does not name"


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch and pickle raise all kinds
        reason = str(error).splitlines()[0]
        raise ConversionError(f"{path}: cannot be read as weights alone: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConversionError(f"{path}: holds something else than named tensors")
    return loaded
