"""Checkpoints as other people's tools leave them: equal logits, or one line with what to do."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from moss_train.config import ConfigError
from moss_train.convert.hf_config import model_config_from_hf, text_config_from_llama
from moss_train.convert.llama import check_llama
from moss_train.convert.megatron_files import WeightFiles
from moss_train.convert.source import ConversionError
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.model_config import ModelConfig
from tests.golden.make_mllama import CONFIG
from tests.moss_train.convert.sources import (
    differing,
    load_folder,
    mllama_weights,
    save_by_transformers,
    save_folder,
)
from tests.moss_train.convert.test_llama import save_llama
from tests.moss_train.model.build import preset
from tests.torchrun import REPO

QUERY = "language_model.model.layers.0.self_attn.q_proj"
MERGE = "merge_and_unload"


def grown() -> ModelConfig:
    return replace(preset("tiny"), tokens_before_first_frame="zero")


def convert(source: Path, out: Path) -> list[str]:
    """Lines of a conversion, of a text model or one with vision."""
    kind = json.loads((source / "config.json").read_text())["model_type"]
    return convert_hf(FromHf(source, out, grow_into=grown() if kind == "llama" else None))


def refusal(source: Path, out: Path) -> str:
    with pytest.raises((ConversionError, ConfigError)) as caught:
        convert(source, out)
    assert not out.exists()
    return str(caught.value)


def change(source: Path, **tensors: Tensor | None) -> None:
    """Adds tensors to a folder of one file, or takes them away (None)."""
    path = source / "model.safetensors"
    weights = load_file(path) | {k: v for k, v in tensors.items() if v is not None}
    kept = {k: v for k, v in weights.items() if k not in tensors or tensors[k] is not None}
    save_file(kept, path, metadata={"format": "pt"})


def logits_of_both(source: Path, out: Path) -> tuple[Tensor, Tensor]:
    """Of text: the source's in transformers, and its export's after a conversion."""
    convert(source, out / "megatron")
    convert_megatron(ToHf(out / "megatron", out / "hf", REPO / "inference/hf"))
    tokens = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    theirs = LlamaForCausalLM.from_pretrained(source).eval()
    ours = MossVideoForConditionalGeneration.from_pretrained(out / "hf").eval()
    with torch.no_grad():
        return theirs(input_ids=tokens).logits, ours(input_ids=tokens).logits


def test_a_head_that_is_not_there_is_missing_unless_it_is_tied(tmp_path):
    save_llama(tmp_path / "llama", False, "5GB")
    change(tmp_path / "llama", **{"lm_head.weight": None})
    said = refusal(tmp_path / "llama", tmp_path / "out")
    assert said.splitlines()[1:] == ["missing: lm_head.weight [320, 64]"]
    model = grown()
    lines = list(check_llama(tmp_path / "llama", model))
    assert any("missing: lm_head.weight [320, 64]" in line for line in lines)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_model_computes_what_transformers_does(kept, tmp_path):
    """Either name may hold the one table; where there are two, transformers takes both."""
    source = tmp_path / "llama"
    save_llama(source, True, "5GB")
    table = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    other = torch.randn_like(table) * 0.2
    if kept == "lm_head.weight":
        change(source, **{"model.embed_tokens.weight": None, "lm_head.weight": table})
    elif kept == "both":
        change(source, **{"lm_head.weight": other})
    wanted, got = logits_of_both(source, tmp_path)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    said = " ".join(convert(source, tmp_path / "again"))
    assert ("the file has another lm_head.weight" in said) == (kept == "both")


def test_saved_buffers_are_no_weights(tmp_path):
    """transformers ignores them; those of another base than config.json's are told."""
    source = tmp_path / "llama"
    save_llama(source, False, "5GB")
    right = 500000.0 ** -(torch.arange(0, 16, 2).float() / 16)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4)]
    change(source, **{name: right.to(torch.float16, copy=True) for name in names})
    change(source, **{"model.embeddings.position_ids": torch.arange(4)})
    wanted, got = logits_of_both(source, tmp_path)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert "rope_theta" not in " ".join(convert(source, tmp_path / "again"))
    change(source, **{name: 1e4 ** -(torch.arange(0, 16, 2).float() / 16) for name in names})
    said = " ".join(convert(source, tmp_path / "other"))
    assert "inv_freq: is not that of rope_theta 500000 and its scaling" in said


@pytest.mark.parametrize(
    ("before", "inside"),
    [
        ("module.", ""),
        ("base_model.model.", ""),
        ("_orig_mod.", ""),
        ("student.net.", ""),
        ("module.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_prefixes_of_all_names_are_taken_off(before, inside, tmp_path):
    weights = mllama_weights()
    named = {
        before + name.replace("layers.0.", f"layers.0.{inside}"): tensor
        for name, tensor in weights.items()
    }
    convert(save_folder(tmp_path / "hf", named), tmp_path / "out")
    convert_megatron(ToHf(tmp_path / "out", tmp_path / "back", REPO / "inference/hf"))
    assert differing(load_folder(tmp_path / "back"), weights) == []


def adapter(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    parts = {f"base_model.model.{QUERY}.lora_{a}.weight": torch.zeros(4, 4) for a in "AB"}
    save_file(parts, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_to_be_merged(tmp_path):
    with pytest.raises(ConversionError, match=f"is an adapter of some/base: .*{MERGE}"):
        convert_hf(FromHf(adapter(tmp_path / "alone"), tmp_path / "out"))
    (tmp_path / "alone/config.json").write_text(json.dumps(CONFIG))
    assert "is an adapter of some/base" in refusal(tmp_path / "alone", tmp_path / "out")
    beside = adapter(save_folder(tmp_path / "beside", mllama_weights()))
    said = refusal(beside, tmp_path / "out")
    assert "an adapter beside its model (adapter_config.json)" in said
    assert MERGE in said
    weights = mllama_weights()
    weights[f"{QUERY}.base_layer.weight"] = weights.pop(f"{QUERY}.weight")
    said = refusal(save_folder(tmp_path / "parts", weights), tmp_path / "out")
    assert f"{QUERY}.base_layer.weight belongs to an adapter" in said
    assert MERGE in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights"),
        ("__0_0.distcp", "accelerate merge-weights"),
        ("consolidated.00.pth", "Meta's own code"),
        ("model.Q4_K_M.gguf", "is GGUF"),
        ("checkpoint-500/config.json", r"give one of its checkpoint-\*"),
        ("snapshots/0e5f/config.json", "folder below snapshots"),
        ("model-00001-of-00002.safetensors", "no model.safetensors.index.json"),
        ("checkpoints/step_00000010/run.json", "give it to megatron-to-hf"),
        ("notes.txt", "holds neither model.safetensors nor"),
    ],
)
def test_other_forms_are_told_apart(file, named, tmp_path):
    path = tmp_path / "hf" / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    for config in (False, True):
        if config:
            (tmp_path / "hf/config.json").write_text(json.dumps(CONFIG))
        elif "holds" in named or "index" in named:
            continue
        with pytest.raises(ConversionError, match=named) as caught:
            convert_hf(FromHf(tmp_path / "hf", tmp_path / "out"))
        assert "\n" not in str(caught.value)


def test_long_lists_are_cut(tmp_path):
    weights = {f"other.{name}": t for name, t in mllama_weights().items()}
    weights["beside"] = torch.zeros(1)
    lines = refusal(save_folder(tmp_path / "hf", weights), tmp_path / "out").splitlines()
    assert len(lines) == 22
    assert lines[-1] == f"and {2 * len(weights) - 1 - 20} more"


@pytest.mark.parametrize(("dtype", "size"), [("F8_E8M0", 8), ("F4", 4), ("U16", 16), ("X9", 8)])
def test_dtypes_that_are_not_read_are_no_damage(dtype, size, tmp_path):
    path = save_folder(tmp_path / "hf", mllama_weights()) / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    places = [len(body), len(body) + size]
    header["extra"] = {"dtype": dtype, "shape": [8], "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body + bytes(size))
    said = refusal(tmp_path / "hf", tmp_path / "out")
    assert f"has dtype {dtype}, which is not read" in said or f"of dtype {dtype}" in said
    assert "fetch it again" not in said


def test_two_rotary_positions_must_agree():
    """transformers 4 reads rope_theta and rope_scaling, 5 rope_parameters."""
    config = copy.deepcopy(CONFIG)
    text = config["text_config"]
    scaled = model_config_from_hf(config).text
    text["rope_scaling"] = {**text["rope_parameters"]}
    text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
    assert model_config_from_hf(config).text == scaled
    text["rope_theta"] = 10000.0
    with pytest.raises(ConfigError, match=r"two rotary positions .*rope_theta: 10000"):
        model_config_from_hf(config)
    text["rope_theta"] = scaled.rope_theta
    text["rope_scaling"]["factor"] = 32.0
    with pytest.raises(ConfigError, match=r"two rotary positions .*factor=32"):
        model_config_from_hf(config)


def test_a_base_without_a_type_is_not_scaled():
    """transformers takes rope_parameters without rope_type for `default`."""
    config = copy.deepcopy(CONFIG)
    config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0}
    text = model_config_from_hf(config).text
    assert (text.rope_theta, text.rope_scaling.factor) == (10000.0, 1.0)
    config["text_config"]["rope_parameters"] = {"rope_theta": 10000.0, "factor": 8.0}
    with pytest.raises(ConfigError, match="rope_type is missing"):
        model_config_from_hf(config)


@pytest.mark.parametrize("name", ["", "model.language_model."])
def test_names_of_a_text_model_without_its_head_are_taken(name, tmp_path):
    """As LlamaModel saves itself, and as it is called inside of a larger model."""
    source = tmp_path / "llama"
    save_llama(source, True, "5GB")
    weights = load_file(source / "model.safetensors")
    kept = {f"{name}{k.removeprefix('model.')}": v for k, v in weights.items()}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "out")
    tensors = WeightFiles(tmp_path / "out")
    wanted = weights["model.embed_tokens.weight"]
    for ours in ("decoder.output.weight", "decoder.embedding.weight"):
        assert torch.equal(tensors.read(ours)[: len(wanted)], wanted)


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("vision_config", {"intermediate_layers_indices": [1, 1]}, r"=\[1\]: name each layer once"),
        ("vision_config", {"intermediate_layers_indices": [1, -1]}, r"=\[-1\]: must be 0 or more"),
        ("vision_config", {"intermediate_layers_indices": [1, 9]}, r"=\[9\]: layers are numbered"),
        ("text_config", {"rms_norm_eps": -1e-5}, "norm_eps=-1e-05: must be greater than 0"),
        ("text_config", {"cross_attention_layers": [1, 99]}, r"=\[99\]: layers are numbered"),
        ("text_config", {"head_dim": 99}, "head_dim is 99, it must be"),
        ("text_config", {"partial_rotary_factor": 0.5}, r"_factor is 0\.5, it must be 1\.0"),
    ],
)
def test_a_model_that_cannot_run_is_not_imported(section, change, says, tmp_path):
    config = copy.deepcopy(CONFIG)
    config[section] |= change
    source = save_folder(tmp_path / "hf", mllama_weights(), config)
    assert re.search(
        rf"config\.json: (makes model|text_config)\..*{says}", refusal(source, tmp_path / "out")
    )


def test_what_an_old_llama_does_not_say_is_what_transformers_has():
    """Llama 1's config.json, and Mllama's of transformers 4: only what is not the class's own."""
    old = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320,
        "num_hidden_layers": 4, "intermediate_size": 128, "hidden_act": "silu",
    }  # fmt: skip
    text = text_config_from_llama(old, preset("tiny").text)
    assert (text.num_kv_heads, text.rope_theta, text.norm_eps) == (4, 10000.0, 1e-6)
    saved = {
        "model_type": "mllama", "image_token_index": 128256, "transformers_version": "4.49.0",
        "torch_dtype": "bfloat16", "vision_config": {"image_size": 560},
        "text_config": {"rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }},
    }  # fmt: skip
    model = model_config_from_hf(saved)
    assert model.text == preset("11b").text
    assert model.vision == replace(preset("11b").vision, full_attention=False)


def test_an_embedding_without_rows_beyond_the_vocabulary_gets_them(tmp_path):
    """As transformers' resize_token_embeddings leaves it: vocab_size rows in both tables."""
    weights, config = mllama_weights(), copy.deepcopy(CONFIG)
    name = "language_model.model.embed_tokens.weight"
    config["text_config"]["vocab_size"] = rows = weights[name].shape[0] + 5
    for table in (name, "language_model.lm_head.weight"):
        grown_table = torch.randn(rows, weights[table].shape[1])
        weights[table] = grown_table
    source = save_folder(tmp_path / "hf", weights, config)
    convert(source, tmp_path / "out")
    convert_megatron(ToHf(tmp_path / "out", tmp_path / "back", REPO / "inference/hf"))
    made = load_folder(tmp_path / "back")[name]
    assert torch.equal(made[:rows], weights[name])
    assert made.shape[0] == rows + 8
    assert not made[rows:].any()
    config["text_config"]["vocab_size"] = rows - 3
    said = refusal(save_folder(tmp_path / "stale", weights, config), tmp_path / "no")
    assert "set vocab_size there to the rows of lm_head.weight" in said


def test_of_two_states_of_the_weights_none_is_taken_unsaid(tmp_path):
    source = tmp_path / "source"
    save_by_transformers(source)
    first = sorted(source.glob("model-*.safetensors"))[0]
    (source / "model-00009-of-00009.safetensors").write_bytes(first.read_bytes())
    lines = convert(source, tmp_path / "out")
    left_out = "model-00009-of-00009.safetensors: left out, for the index does not name it"
    assert left_out in lines
    (source / "model.safetensors").write_bytes(first.read_bytes())
    assert "model.safetensors and model.safetensors.index.json" in refusal(source, tmp_path / "two")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model.safetensors", "is a pointer of Git LFS"),
        ("tokenizer.json", "is a pointer of Git LFS"),
        ("link", "model.safetensors: is a link to ../blobs/1, which is not there"),
    ],
)
def test_files_that_were_not_fetched_are_told(file, says, tmp_path):
    source = tmp_path / "source"
    save_folder(source, mllama_weights())
    if file == "link":
        (source / "model.safetensors").unlink()
        (source / "model.safetensors").symlink_to("../blobs/1")
    else:
        (source / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert says in refusal(source, tmp_path / "out")


def test_tensors_that_their_rank_did_not_hold_are_told(tmp_path):
    """What ZeRO-3 and FSDP leave of a model that one rank saves."""
    empty = {name: t[:0] if t.dim() > 1 else t for name, t in mllama_weights().items()}
    said = refusal(save_folder(tmp_path / "source", empty), tmp_path / "out")
    count = sum(tensor.numel() == 0 for tensor in empty.values())
    assert f"{count} of {len(empty)} tensors are empty" in said
    assert "zero_to_fp32.py" in said


def test_the_index_of_a_variant_is_to_be_renamed(tmp_path):
    source = save_by_transformers(tmp_path / "source")
    (source / "model.safetensors.index.json").rename(source / "model.safetensors.index.bf16.json")
    says = "model.safetensors.index.bf16.json, the index of a variant of the weights: rename it"
    assert says in refusal(source, tmp_path / "out")


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    source = tmp_path / "source"
    save_folder(source, mllama_weights())
    convert(source, tmp_path / "out")
    (source / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refusal(source, tmp_path / "other")
    with pytest.raises(ConversionError, match=r"tokenizer.json cannot be read"):
        convert_megatron(
            ToHf(tmp_path / "out", tmp_path / "hf", REPO / "inference/hf", tokenizer=source)
        )
