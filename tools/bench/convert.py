"""Measures time and memory of converting a checkpoint of a model's size to training's format and
back.

The checkpoint has random bf16 weights in the published format. Afterwards all tensors are compared;
the exit code is 1 where one differs. FOLDER needs room for three times the model.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from math import prod
from pathlib import Path

import psutil
import torch
from torch import Tensor

from data_pipeline.commands import CommandParser
from moss_train.convert.hf_config import EXTRA_EMBEDDING_ROWS
from moss_train.convert.hf_files import text_section, vision_section
from moss_train.convert.job import run_workers
from moss_train.convert.source import HfFolder
from moss_train.convert.to_hf import Tensors, plan_shards, write_shards
from moss_train.model.hf_mapping import hf_shapes, normalize_name, table
from tools.convert_checkpoint import read_model


def main() -> int:
    """Measures; returns 1 where converting back does not give the same bits."""
    parser = CommandParser("python -m tools.bench.convert", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder for the checkpoints")
    parser.add_argument(
        "--model", type=Path, metavar="FILE.yaml", help="as in conf/model (default: 11b's)"
    )
    parser.add_argument("--workers", type=int, default=2, help="threads of a conversion")
    options = parser.parse_args()
    hf, megatron, back = (options.folder / name for name in ("hf", "megatron", "back"))
    began = time.monotonic()
    largest = write_source(hf, options.model, options.workers)
    print(f"random weights: {time.monotonic() - began:.0f} s", flush=True)
    print(f"bound of peak memory: {(3 * largest + 2 * 2**30) / 2**30:.2f} GiB", flush=True)
    workers = ["--workers", str(options.workers)]
    measured("hf-to-megatron", str(hf), str(megatron), *workers)
    measured("megatron-to-hf", str(megatron), str(back), *workers)
    shutil.rmtree(megatron)
    differing = compare(hf, back, options.workers)
    print(f"{len(differing)} tensors differ {differing[:5]}")
    return 1 if differing else 0


def write_source(folder: Path, preset: Path | None, workers: int) -> int:
    """Writes a published checkpoint's files; returns the bytes of the largest tensor."""
    folder.mkdir(parents=True)
    model = read_model(preset)
    groups = [
        Tensors(rule, {n: (shape, torch.bfloat16) for n, shape in hf_shapes(model, rule).items()})
        for rule in table(model)
    ]

    def parts(group: Tensors) -> dict[str, Tensor]:
        return {name: _numbers(shape) for name, (shape, _) in group.parts.items()}

    write_shards(folder, plan_shards(groups, 5 * 10**9), parts, workers, lambda size: None)
    config = {
        "model_type": "mllama",
        "dtype": "bfloat16",
        "image_token_index": model.text.vocab_size,
        "pool_mode": model.projector.pool,
        "pool_stride": model.projector.stride,
        "text_config": text_section(model, {}, None),
        "vision_config": vision_section(model),
    }
    assert model.text.extra_embedding_rows == EXTRA_EMBEDDING_ROWS
    (folder / "config.json").write_text(json.dumps(config))
    return max(prod(s) * 2 for group in groups for s, _ in group.parts.values())


def _numbers(shape: torch.Size) -> Tensor:
    """Random signs and fractions, 0.5 to 1: a tenth of the time of a normal distribution."""
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    return ((bits & -32641) | 0x3F00).view(torch.bfloat16)  # -32641: sign and fraction


def measured(*arguments: str) -> None:
    """Runs tools.convert_checkpoint; prints its peak memory, mapped files included."""
    command = [sys.executable, "-m", "tools.convert_checkpoint", *arguments]
    began, peak = time.monotonic(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.Error:
            break
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.monotonic() - began
    print(f"{arguments[0]}: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB", flush=True)


def compare(one: Path, other: Path, workers: int) -> list[str]:
    """Names of the tensors whose bits differ between the folders."""
    a, b = HfFolder(one, normalize_name), HfFolder(other, normalize_name)
    names = sorted(a.tensors.keys() | b.tensors.keys())

    def same(name: str) -> bool:
        if name not in a.tensors or name not in b.tensors:
            return False
        return torch.equal(a.read(name).view(torch.int16), b.read(name).view(torch.int16))

    equal = run_workers(names, same, workers)
    return [name for name, ok in zip(names, equal, strict=True) if not ok]


if __name__ == "__main__":
    sys.exit(main())
