"""Adapters of a bf16 run are merged in fp32 and rounded once, to the dtype that is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moss_train.checkpoint_dir import write_complete
from moss_train.config import AdapterConfig, Config, RunConfig, to_dict
from moss_train.convert.job import MemoryBudget
from moss_train.convert.megatron_files import boxes_of_rows, write_boxes, write_metadata
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.model.hf_mapping import our_shape, table
from tests.moss_train.model.build import preset
from tests.torchrun import REPO

LAYER = "decoder.layers.0.attention.linear_proj"
HF = "language_model.model.layers.0.self_attn.o_proj.weight"


def save(folder: Path, update: float) -> dict[str, Tensor]:
    """A checkpoint of tiny in bf16 with one adapter; its tensors."""
    model = replace(preset("tiny"), dtype="bf16")
    generator = torch.Generator().manual_seed(0)
    shapes = {rule.ours: our_shape(model, rule) for rule in table(model)}
    out, inner = shapes[f"{LAYER}.weight"]
    shapes |= {f"{LAYER}.lora_a": torch.Size([4, inner]), f"{LAYER}.lora_b": torch.Size([out, 4])}
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    tensors[f"{LAYER}.lora_b"] *= update
    folder.mkdir()
    boxes = [
        box
        for name, tensor in tensors.items()
        for box in boxes_of_rows(name, tensor.shape, tensor.dtype, tensor.__getitem__, 2**28)
    ]
    places, _ = write_boxes(folder / "__0_0.distcp", boxes, MemoryBudget(2**28), lambda _: None)
    write_metadata(folder, shapes, boxes, [], places)
    config = Config(run=RunConfig(dir=""), model=model, adapter=AdapterConfig("lora", 4, 8.0))
    config.data.tokenizer = ""
    run = {"step": 3, "samples": 12, "layout": {}, "versions": {}, "config": to_dict(config)}
    (folder / "run.json").write_text(json.dumps(run))
    write_complete(folder)
    return tensors


def exported(folder: Path, **options) -> tuple[dict[str, Tensor], str]:
    out = folder.parent / "hf"
    lines = convert_megatron(ToHf(folder, out, REPO / "inference/hf", **options))
    return load_file(out / "model-00001-of-00001.safetensors"), "\n".join(lines)


def exact(tensors: dict[str, Tensor]) -> Tensor:
    a, b, weight = (tensors[f"{LAYER}.{part}"].double() for part in ("lora_a", "lora_b", "weight"))
    return weight + 8.0 / 4 * (b @ a)


@pytest.mark.parametrize(("update", "told"), [(1.0, False), (1e-3, True)])
def test_the_merge_is_rounded_once(update, told, tmp_path):
    tensors = save(tmp_path / "run", update)
    wanted = exact(tensors)
    made, said = exported(tmp_path / "run")
    assert torch.equal(made[HF], wanted.float().to(torch.bfloat16))
    assert ("rounding the merged weights to bf16 loses" in said) == told
    assert ("--dtype fp32 keeps them" in said) == told


def test_fp32_keeps_the_whole_update(tmp_path):
    tensors = save(tmp_path / "run", 1e-3)
    made, said = exported(tmp_path / "run", dtype="fp32")
    torch.testing.assert_close(made[HF].double(), exact(tensors), rtol=1e-6, atol=1e-6)
    assert "loses" not in said


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_what_is_quantized_is_not_rounded_before(dtype, tmp_path):
    """Numbers are the nearest to the exact weights in steps of the stored scale; other tensors
    have the dtype that is asked for."""
    wanted = exact(save(tmp_path / "run", 1.0))
    made, _ = exported(tmp_path / "run", dtype=dtype, quantize="int8")
    scale = made[f"{HF}_scale"]
    assert scale.dtype == (torch.float32 if dtype else torch.bfloat16)
    assert made["language_model.model.norm.weight"].dtype == scale.dtype
    numbers = (wanted / scale.double()).clamp(-127, 127).round()
    assert (made[HF].double() - numbers).abs().max() <= 1
    assert (made[HF].double() == numbers).float().mean() > 0.999
