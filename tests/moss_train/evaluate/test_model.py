"""A checkpoint is read by a machine without the kernels that it was trained with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.tokens import build_toy_tokenizer
from moss_train.checkpoint_dir import read_run, write_complete
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.evaluate.controls import ModelInput
from moss_train.evaluate.model import TrainedModel
from tests.golden.make_mllama import CONFIG
from tests.moss_train.convert.sources import mllama_weights, save_folder
from tests.torchrun import REPO
from tools.verify_checkpoint import main as verify

MOSS = {
    **CONFIG, "text_config": CONFIG["text_config"] | {"vocab_size": 512}, "image_token_index": 512,
    "pool_mode": "average", "pool_stride": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer, and its export."""
    out, weights = tmp_path_factory.mktemp("made"), mllama_weights()
    generator = torch.Generator().manual_seed(1)
    for name, rows in (("model.embed_tokens", 520), ("lm_head", 512)):
        drawn = torch.randn(rows, 32, generator=generator)
        weights[f"language_model.{name}.weight"] = drawn
    source = save_folder(out / "source", weights, MOSS)
    build_toy_tokenizer(source, ["a man walks a dog"], 512)
    convert_hf(FromHf(source, out / "checkpoint"))
    convert_megatron(ToHf(out / "checkpoint", out / "export", REPO / "inference/hf"))
    return out


def chances(checkpoint: Path) -> list[torch.Tensor]:
    """What the model says of a text."""
    with TrainedModel.open(checkpoint, "cpu", threads=1) as model:
        none = torch.zeros(0, 1, model.config.model.text.hidden_size)
        shown = ModelInput([1, 5, 9, 30, 7, 2], [], none, torch.zeros(0, dtype=torch.long))
        ((likely, chance),) = model.predict([shown])
        return [likely, chance]


@pytest.mark.parametrize("attention", ["flash", "te", "flex"])
def test_kernels_of_a_gpu_are_no_part_of_a_checkpoint(made, groups, attention, tmp_path) -> None:
    checkpoint = shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    run = read_run(checkpoint)
    run["config"]["model"] |= {"attention": attention, "fp8": "tower", "flex_backend": "flash"}
    (checkpoint / "run.json").write_text(json.dumps(run))
    (checkpoint / "complete.json").unlink()
    write_complete(checkpoint)
    for one, other in zip(chances(checkpoint), chances(made / "checkpoint"), strict=True):
        assert torch.equal(one, other)
    if attention == "flash":  # which takes no fp32 anywhere
        assert verify(["--hf", str(made / "export"), "--megatron", str(checkpoint)]) == 0
