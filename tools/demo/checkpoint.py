"""Packs the weights that the demo starts from, and unpacks them.

Packed, they have 7 bits and a scale for each row, and are a fifth as large as in fp32. EXPORT is a
folder of tools.convert_checkpoint.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.commands import CommandParser, report_error

SHIPPED = Path(__file__).parent / "checkpoint"
WEIGHTS = "weights.npz"
FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "training.json",
)  # fmt: skip
LARGEST = 63  # 7 bits; with 8 the file has 2.1 MB, and is not better (docs/toy.md)
SCALE = "/scale"  # follows a tensor's name


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = CommandParser("python -m tools.demo.checkpoint", description=__doc__)
    parser.add_argument("direction", choices=("pack", "unpack"))
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder with whole weights")
    packed = "folder with packed weights (default: tools/demo/checkpoint)"
    parser.add_argument(
        "folder", type=Path, nargs="?", default=SHIPPED, metavar="FOLDER", help=packed
    )
    options = parser.parse_args(arguments)
    try:
        if options.direction == "pack":
            pack(options.export, options.folder)
        else:
            unpack(options.folder, options.export)
    except OSError as error:
        return report_error(parser.prog, f"{error.filename}: {error.strerror}")
    if options.direction == "pack":
        print(f"{options.folder}: {(options.folder / WEIGHTS).stat().st_size / 1e6:.2f} MB")
    else:
        print(options.export)
    return 0


def pack(export: Path, out: Path) -> None:
    """Writes `out` from a folder of tools.convert_checkpoint."""
    packed: dict[str, np.ndarray] = {}
    for file in sorted(export.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.dim() < 2:
                packed[name] = tensor.half().numpy()
            else:
                packed[name], packed[name + SCALE] = (part.numpy() for part in _quantize(tensor))
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / WEIGHTS, allow_pickle=False, **packed)
    for name in FILES:
        shutil.copyfile(export / name, out / name)


def unpack(folder: Path, out: Path) -> None:
    """Writes an fp32 export into `out` from a folder that `pack` wrote."""
    with np.load(folder / WEIGHTS, allow_pickle=False) as packed:
        tensors = {name: torch.from_numpy(packed[name]) for name in packed.files}
    weights = {}
    for name, tensor in tensors.items():
        if not name.endswith(SCALE):
            scale = tensors.get(name + SCALE)
            whole = tensor.float()
            weights[name] = whole if scale is None else whole * _per_row(scale.float(), whole)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(folder / name, out / name)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor `[rows, ...]` as whole numbers up to LARGEST, and an fp16 scale for each row."""
    scale = (tensor.abs().flatten(1).amax(1) / LARGEST).clamp(min=1e-6).half()
    numbers = (tensor / _per_row(scale.float(), tensor)).round().clamp(-LARGEST, LARGEST)
    return numbers.to(torch.int8), scale


def _per_row(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (tensor.dim() - 1))


if __name__ == "__main__":
    sys.exit(main())
