"""hf -> megatron -> hf gives every bit back, whatever layout saved the checkpoint in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moss_train.checkpoint_dir import read_run
from moss_train.config import from_dict
from moss_train.convert.megatron_files import WeightFiles
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from tests.golden.make_mllama import CONFIG
from tests.moss_train.convert.sources import (
    as_transformers_5,
    differing,
    load_folder,
    mllama_weights,
    save_by_transformers,
    save_folder,
)
from tests.moss_train.model.golden import LIMITS, mllama_case
from tests.torchrun import REPO, Result, run_ranks

LAYOUTS = {
    # First: after other layouts, its groups of the same ranks have names that are taken.
    "tp2_sp_vision": {"tensor": 2, "sequence": True, "vision_tensor": True},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
    "pp2_vp2": {"pipeline": 2, "virtual": 2},
    "lora": {"tensor": 2, "lora": True},
}


def export(source: Path, out: Path, said: str = "", **options) -> dict[str, torch.Tensor]:
    assert said in "\n".join(convert_megatron(ToHf(source, out, REPO / "inference/hf", **options)))
    return load_folder(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    convert_hf(FromHf(save_by_transformers(folder / "hf"), folder / "megatron"))
    return folder / "megatron"


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory) -> Result:
    """The checkpoint, loaded and saved by four ranks in every layout."""
    out = tmp_path_factory.mktemp("saved")
    layouts = json.dumps(LAYOUTS)
    return run_ranks("tests/workers/convert.py", 4, str(checkpoint), str(out), layouts, out=out)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "lora"])
def test_every_layout_gives_every_bit_back(layout, saved, tmp_path):
    exported = export(saved.out / layout, tmp_path / "hf", max_shard_size=60_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    assert len(exported) == 112
    assert differing(exported, mllama_weights()) == []


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2_pp2", "tp2_sp_vision"])
def test_every_layout_computes_what_transformers_does(layout, saved):
    case, made = mllama_case(), saved.load(layout, rank=3)
    kept = case.attention_mask.bool()
    off = (made["logits"] - case.expected["logits"])[kept].abs().max()
    assert off < LIMITS["logits"]
    assert (made["loss"] - case.expected["loss"]).abs() < LIMITS["loss"]
    assert made["greedy"].tolist() == case.expected["greedy"].tolist()


def test_adapters_are_merged(saved, tmp_path):
    """As training merges them, in tensor-parallel slices."""
    exported, held = export(saved.out / "lora", tmp_path / "hf"), saved.load("lora-weights")
    assert exported.keys() == held.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(exported[name], tensor, rtol=1e-6, atol=1e-6)
    changed = differing(exported, mllama_weights())
    assert {name.split(".")[-3] for name in changed} == {"self_attn", "cross_attn", "mlp"}
    assert len(changed) > 20
    assert all(name.endswith("_proj.weight") for name in changed)


def test_names_of_transformers_5_and_the_way_back_to_a_checkpoint(checkpoint, tmp_path):
    weights = mllama_weights()
    new = save_folder(tmp_path / "new", as_transformers_5(weights))
    convert_hf(FromHf(new, tmp_path / "megatron"))
    exported = export(tmp_path / "megatron", tmp_path / "hf", target="mllama")
    assert differing(exported, weights) == []
    # Our own export is a source, too.
    convert_hf(FromHf(tmp_path / "hf", tmp_path / "again"))
    assert differing(export(tmp_path / "again", tmp_path / "back"), weights) == []


def test_dtypes_are_kept_or_cast(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in mllama_weights().items()}
    config = {**CONFIG, "torch_dtype": "bfloat16"}
    convert_hf(FromHf(save_folder(tmp_path / "hf", weights, config), tmp_path / "megatron"))
    assert differing(export(tmp_path / "megatron", tmp_path / "bf16"), weights) == []
    wide = export(tmp_path / "megatron", tmp_path / "fp32", dtype="fp32")
    assert differing(wide, {name: tensor.float() for name, tensor in weights.items()}) == []
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    half = {name: tensor.half() for name, tensor in mllama_weights().items()}
    config = {**CONFIG, "torch_dtype": "float16"}
    source = save_folder(tmp_path / "half", half, config)
    convert_hf(FromHf(source, tmp_path / "cast", dtype="bf16"))
    narrow = export(tmp_path / "cast", tmp_path / "narrow")
    assert differing(narrow, {name: tensor.bfloat16() for name, tensor in half.items()}) == []


@pytest.mark.parametrize("exact", ["gate_proj", "up_proj", "q_proj", "v_proj", "norm"])
def test_tensors_of_one_parameter_that_differ_in_dtype_keep_their_numbers(exact, tmp_path):
    """A fused parameter has the dtype of its most exact part."""
    weights = {
        name: tensor if exact in name else tensor.bfloat16()
        for name, tensor in mllama_weights().items()
    }
    convert_hf(FromHf(save_folder(tmp_path / "hf", weights), tmp_path / "megatron"))
    exported = export(tmp_path / "megatron", tmp_path / "back")
    assert exported.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(exported[name].double(), tensor.double()), name


@pytest.mark.parametrize("rows", [72, 75])
def test_rows_for_tensor_ranks_are_added_and_dropped(rows, tmp_path):
    """The embedding has 72 rows, or some more that someone has added."""
    weights = mllama_weights()
    embedding = weights["language_model.model.embed_tokens.weight"]
    more = torch.cat((embedding, torch.ones(rows - 72, 32)))
    source = {**weights, "language_model.model.embed_tokens.weight": more}
    folder = save_folder(tmp_path / "hf", source)
    convert_hf(FromHf(folder, tmp_path / "megatron", tensor_parallel=16))
    found = WeightFiles(tmp_path / "megatron").read("decoder.embedding.weight")
    assert found.shape == (80, 32)
    assert torch.equal(found[:rows], more)
    assert not found[rows:].any()
    text = from_dict(read_run(tmp_path / "megatron")["config"]).model.text
    assert text.vocab_size + text.extra_embedding_rows == 80
    said = "embedding: without its last 8 rows"
    assert differing(export(tmp_path / "megatron", tmp_path / "back", said), weights) == []
