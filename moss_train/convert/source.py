"""Reads a folder in Hugging Face's form, which is not trusted, a tensor at a time.

Weights are read from safetensors. Nothing is unpickled unless that is allowed, and then by torch's
reader of weights alone. Files are those of the folder: an index cannot point out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.files import NOT_FETCHED, is_lfs_pointer
from moss_train.convert.folders import adapter_beside, foreign_form, merge_advice
from moss_train.convert.names import adapter_part, common_prefix, is_buffer, shortened, unwrapped

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
    """The weights of a folder. `tensors` maps names to what is stored: without the prefixes of
    wrappers, normalized by `rename`. `buffers` has what follows from config.json, which is no
    weight. `notes` says what a reader should know.

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
        stored: list[Stored] = []
        problems = []
        for path in files:
            try:
                stored += self._read_header(path)
            except SafetensorError as error:
                problems.append(f"{path}: {_unreadable(path, error)}")
            except ConversionError as error:
                problems.append(str(error))
        if index is not None and not problems:
            problems += _disagreements(folder, index, stored)
        if problems:
            raise ConversionError("\n".join(shortened(problems)))
        self.notes = _unnamed(folder, files) if index is not None else []
        self.tensors, self.buffers = self._sorted_out(stored, rename)

    def _sorted_out(
        self, stored: list[Stored], rename: Callable[[str], str]
    ) -> tuple[dict[str, Stored], dict[str, Stored]]:
        """Weights and buffers, by the names that a model without wrappers has."""
        part = adapter_part([one.name for one in stored])
        if part is not None:
            raise ConversionError(
                f"{self.folder}: {part} belongs to an adapter of PEFT: {merge_advice()}"
            )
        names = {one.name: unwrapped(one.name) for one in stored}
        prefix = common_prefix(names.values())
        if prefix:
            self.notes.append(f"names: without {prefix}, which all of them begin with")
        tensors: dict[str, Stored] = {}
        buffers: dict[str, Stored] = {}
        problems = []
        for one in stored:
            name = names[one.name].removeprefix(prefix)
            kind = buffers if is_buffer(name) else tensors
            other = kind.setdefault(name if kind is buffers else rename(name), one)
            if other is not one:
                problems.append(f"{one.file}: {one.name} is in {other.file.name}, too")
        if problems:
            raise ConversionError("\n".join(shortened(problems)))
        return tensors, buffers

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Every dtype that a weight has."""
        return {stored.dtype for stored in self.tensors.values()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Reads only `rows` (of dimension 0) of one tensor, as stored."""
        return self.read_stored(self.tensors[name], rows)

    def read_stored(self, stored: Stored, rows: slice = slice(None)) -> Tensor:
        """As `read`, of a tensor or a buffer."""
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
                    raise ConversionError(f"{path}: {name} {_unread(part.get_dtype())}")
                headers.append(Stored(path, name, torch.Size(part.get_shape()), dtype))
        return headers


def problems_of(folder: HfFolder, shapes: Mapping[str, torch.Size]) -> list[str]:
    """A line for every tensor that is missing, surplus or misshapen; long lists are cut."""
    tensors = folder.tensors
    problems = [f"missing: {n} {list(shape)}" for n, shape in shapes.items() if n not in tensors]
    for name, stored in tensors.items():
        if name not in shapes:
            problems.append(
                f"surplus: {stored.name} {list(stored.shape)}, which the model does not have"
            )
        elif stored.shape != shapes[name]:
            problems.append(_misshapen(name, stored, shapes[name]))
    empty = sum(0 in stored.shape for stored in tensors.values())
    if empty:
        problems.insert(
            0,
            f"{empty} of {len(tensors)} tensors are empty: saved by one rank of ZeRO-3 or FSDP, "
            "which held none of them? Then gather the weights (DeepSpeed: zero_to_fp32.py of the "
            "training's folder), and convert those",
        )
    return shortened(problems)


def _misshapen(name: str, stored: Stored, shape: torch.Size) -> str:
    line = f"misshapen: {stored.name} {list(stored.shape)}, must be {list(shape)}"
    table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    if table and len(stored.shape) == 2 and stored.shape[1:] == shape[1:]:
        line += (
            ": resized after config.json was written? Then set vocab_size there to the rows of "
            "lm_head.weight"
        )
    return line


def _unread(dtype: str) -> str:
    return (
        f"has dtype {dtype}, which is not read: quantized weights cannot be trained: convert what "
        "they were made of"
    )


def _unreadable(path: Path, error: SafetensorError) -> str:
    if is_lfs_pointer(path):
        return NOT_FETCHED
    unknown = re.search(r"unknown variant `(\w+)`", str(error))
    if unknown is not None:
        return f"a tensor {_unread(unknown[1])}"
    return f"damaged or cut short ({error}): fetch it again"


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
        raise ConversionError(f"{folder}: {foreign_form(folder)}")
    names = [SAFE, PICKLED] if allow_pickle else [SAFE]
    for name in names:
        index = folder / f"{name}.index.json"
        found: tuple[dict[str, str] | None, list[Path]] = (None, [folder / name])
        if index.is_file():
            found = _read_index(folder, index)
            if (folder / name).is_file() and folder / name not in found[1]:
                raise ConversionError(
                    f"{folder}: holds {name} and {index.name}, whose files are others: remove the "
                    "weights that are not the model's"
                )
        if index.is_file() or (folder / name).is_file():
            beside = adapter_beside(folder)
            if beside is not None:
                raise ConversionError(
                    f"{folder}: holds an adapter beside its model ({beside}): {merge_advice()}; "
                    "remove the adapter's files if the weights already have it"
                )
            return found
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled and not allow_pickle:
        raise ConversionError(
            f"{folder}: its weights are pickled ({pickled[0]}), which can run code: "
            "get the safetensors, or use torch's reader of weights alone (--allow-pickle)"
        )
    variant = next(folder.glob(f"{SAFE}.index.*.json"), None)
    if variant is not None:
        raise ConversionError(
            f"{folder}: holds {variant.name}, the index of a variant of the weights: rename it "
            f"{SAFE}.index.json"
        )
    form = foreign_form(folder)
    if form is not None:
        raise ConversionError(f"{folder}: {form}")
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    numbered = [part for part in parts if re.fullmatch(r"model-.*-of-.*", part)]
    if numbered:
        raise ConversionError(f"{folder}: holds {numbered[0]}, but no {SAFE}.index.json: fetch it")
    for path in (folder / SAFE, folder / f"{SAFE}.index.json"):
        if path.is_symlink():
            raise ConversionError(f"{path}: is a link to {path.readlink()}, which is not there")
    if parts:
        raise ConversionError(
            f"{folder}: holds {', '.join(shortened(parts, 3))}, but no {SAFE}: rename what is the "
            "whole model"
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
    there: dict[str, list[str]] = {}
    for stored in tensors:
        there.setdefault(stored.name, []).append(stored.file.name)
    for name, file in index.items():
        if file not in there.get(name, []):
            yield f"{folder}: the index says that {file} holds {name}, which it does not"
    for name, files in there.items():
        if name not in index:
            yield f"{folder / files[0]}: holds {name}, which the index does not name"
        elif len(files) > 1:
            yield f"{folder}: {' and '.join(files)} hold {name}: fetch both again"


def _unnamed(folder: Path, named: Iterable[Path]) -> list[str]:
    """A line for shards beside those that the index names, of an earlier state say."""
    others = sorted(path.name for path in {*folder.glob("model-*.safetensors")} - {*named})
    return [f"{', '.join(shortened(others))}: left out, for the index does not name it"] * bool(
        others
    )


def _unpickle(path: Path) -> dict[str, Tensor]:
    try:
        # torch before 1.6 wrote no zip archive, which alone can be mapped.
        mapped = is_zipfile(path)
        loaded = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
    except Exception as error:  # torch and pickle raise all kinds
        reason = str(error).splitlines()[0]
        raise ConversionError(f"{path}: cannot be read as weights alone: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConversionError(f"{path}: holds something else than named tensors")
    return loaded
