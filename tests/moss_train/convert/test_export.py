"""An export opens in transformers and computes what the numbers of others say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaForCausalLM,
)

from data_pipeline.tokens import build_toy_tokenizer
from moss_train.config import Config, StageConfig
from moss_train.convert.hf_files import HfFiles
from moss_train.convert.source import ConversionError
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from moss_train.model_config import ModelConfig
from moss_train.verify.case import Case, read_case
from tests.golden.make_mllama import CONFIG, IMAGE
from tests.moss_train.convert.sources import WEIGHTS, load_folder, mllama_weights, save_folder
from tests.moss_train.convert.test_llama import save_llama
from tests.moss_train.model.golden import LIMITS
from tests.torchrun import REPO
from tools.verify_checkpoint import load_hf, main, run_hf

MOSS = {**CONFIG, "pool_mode": "average", "pool_stride": 2, "silence_token_id": 11}


def exported(source: Path, out: Path, imported: dict | None = None, **options) -> Path:
    """Through a checkpoint; `out` has it and the export."""
    convert_hf(FromHf(source, out / "megatron", **(imported or {})))
    convert_megatron(ToHf(out / "megatron", out / "hf", REPO / "inference/hf", **options))
    return out / "hf"


def opened(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()


def logits(model: Any, case: Case) -> torch.Tensor:
    return run_hf(model, case, 0)["logits"][case.attention_mask.bool()]


@pytest.fixture(scope="module")
def plain_case() -> Case:
    return read_case(WEIGHTS, IMAGE, -1, 1.0)


@pytest.fixture(scope="module")
def toy_tokenizer(tmp_path_factory) -> Path:
    return build_toy_tokenizer(tmp_path_factory.mktemp("tokenizer"), ["a man"], 512)


@pytest.mark.parametrize("target", ["moss", "mllama"])
def test_plain_llama_vision_through_a_checkpoint(target, plain_case, tmp_path):
    """In our class, and in transformers' own: the golden numbers are of the latter."""
    source = save_folder(tmp_path / "hf", mllama_weights())
    folder = exported(source, tmp_path / "out", target=target)
    model = load_hf(folder, torch.float32)
    assert type(model).__module__.startswith("transformers.models.mllama") == (target == "mllama")
    made = run_hf(model, plain_case, 8)
    kept = plain_case.attention_mask.bool()
    off = (made["logits"] - plain_case.expected["logits"])[kept].abs().max()
    assert off < LIMITS["logits"]
    assert (made["loss"] - plain_case.expected["loss"]).abs() < LIMITS["loss"]
    assert made["greedy"].tolist() == plain_case.expected["greedy"].tolist()


@torch.no_grad()
def test_every_class_of_transformers_opens_an_export(plain_case, tmp_path):
    """And what such a class saves again. The model without a head gives the last states."""
    export = exported(save_folder(tmp_path / "source", mllama_weights()), tmp_path)
    first = opened(export)
    first.save_pretrained(tmp_path / "again")
    inputs = {"input_ids": torch.tensor([[3, 9, 27, 2]])}
    wanted = first(**inputs, output_hidden_states=True)
    for folder in (export, tmp_path / "again"):
        for kind in (AutoModelForCausalLM, AutoModelForMultimodalLM):
            model = kind.from_pretrained(folder, trust_remote_code=True).eval()
            assert torch.equal(model(**inputs).logits, wanted.logits)
        bare, info = AutoModel.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(bare.eval()(**inputs).last_hidden_state, wanted.hidden_states[-1])
    bare.save_pretrained(tmp_path / "bare")
    again = AutoModel.from_pretrained(tmp_path / "bare", trust_remote_code=True).eval()
    assert torch.equal(again(**inputs).last_hidden_state, wanted.hidden_states[-1])
    with pytest.raises(ConversionError, match="is a MossVideoModel, which has no output head"):
        convert_hf(FromHf(tmp_path / "bare", tmp_path / "no"))


def test_moss_video_through_a_checkpoint(shared, tmp_path, capsys):
    """shared/golden's form is a source; its numbers come out of the export again."""
    folder = exported(shared / "golden", tmp_path)
    assert load_folder(folder).keys() == load_file(shared / "golden/model.safetensors").keys()
    for name in ("image", "video_padded"):
        path = shared / "golden" / f"{name}.safetensors"
        assert main(["--hf", str(folder), "--inputs", str(path)]) == 0
    config = json.loads((folder / "config.json").read_text())
    assert (config["pool_mode"], config["pool_stride"]) == ("average", 2)
    assert (config["silence_token_id"], config["silence_weight"]) == (11, 0.1)
    assert config["tokens_before_first_frame"] == "attend_all"
    assert "equal within" in capsys.readouterr().out
    args = ["--hf", str(folder), "--inputs", str(path), "--trust-remote-code"]
    assert main(args) == 0
    args += ["--tolerance", "1e-9"]
    assert main(args) == 1
    assert "logits differ by" in capsys.readouterr().out


def test_the_folder_has_tokenizer_processor_and_stage(toy_tokenizer, tmp_path):
    config = json.loads(json.dumps(MOSS))
    config["text_config"]["vocab_size"], config["image_token_index"] = 512, 512
    weights = mllama_weights()
    generator = torch.Generator().manual_seed(1)
    for name, rows in (("model.embed_tokens", 520), ("lm_head", 512)):
        shape = (rows, 32)
        weights[f"language_model.{name}.weight"] = torch.randn(shape, generator=generator)
    config["silence_weight"] = 0.25
    del config["silence_token_id"]  # MOSS's is another than the tokenizer's
    source = save_folder(tmp_path / "hf", weights, config)
    for path in toy_tokenizer.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    folder = exported(source, tmp_path / "out", {"stage": "realtime_sft"})
    model = opened(folder)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    special = processor.tokenizer.convert_tokens_to_ids
    assert model.config.moss_stage == "realtime_sft"
    assert model.config.moss_prompt_form == "realtime"
    assert model.config.silence_token_id == special("<|silence|>")
    assert model.config.silence_weight == 0.25
    assert model.config.video_token_id == special("<|video|>")
    assert model.config.image_token_index == special("<|image|>") == 512
    assert model.generation_config.eos_token_id == [
        special("<|end_of_text|>"),
        special("<|eot_id|>"),
    ]
    picture = torch.zeros(3, 28, 28, dtype=torch.uint8).numpy().transpose(1, 2, 0)
    turns = [{"role": "user", "content": "<|image|>What?"}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 1, 3, 28, 28)
    assert (inputs["input_ids"] == 512).sum() == 1
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 3
    small = build_toy_tokenizer(tmp_path / "other", ["a man"], 600)
    options = ToHf(
        tmp_path / "out/megatron", tmp_path / "no", REPO / "inference/hf", tokenizer=small
    )
    with pytest.raises(ConversionError, match="has 601 tokens, transformers gives"):
        convert_megatron(options)


def test_what_only_moss_video_has_is_no_plain_mllama(tmp_path):
    source = save_folder(tmp_path / "hf", mllama_weights(), MOSS)
    with pytest.raises(ConversionError) as caught:
        exported(source, tmp_path / "out", target="mllama")
    for field in (
        "projector.pool=average",
        "vision.full_attention=True",
        "cross_attention_rope=True",
    ):
        assert f"model.{field}" in str(caught.value)
    assert not (tmp_path / "out/hf").exists()


def test_arch_moss_and_a_patch_merger(tmp_path):
    weights = mllama_weights()
    weights["patch_merger.weight"] = torch.randn(48, 48, 2, 2) * 0.1
    source = save_folder(tmp_path / "hf", weights)
    folder = exported(source, tmp_path / "out", {"arch": "moss"})
    config = json.loads((folder / "config.json").read_text())
    assert (config["pool_mode"], config["pool_stride"]) == ("channel_fusion", 2)
    assert torch.equal(load_folder(folder)["patch_merger.weight"], weights["patch_merger.weight"])
    assert opened(folder).model.patch_merger.weight.shape == (48, 48, 2, 2)


def test_a_text_model_is_grown_with_closed_gates(tmp_path):
    """Its logits are the text model's, with a frame or without."""
    from tests.moss_train.model.build import preset

    llama: LlamaForCausalLM = save_llama(tmp_path / "llama", False, "100KB")
    into: ModelConfig = replace(preset("tiny"), tokens_before_first_frame="zero")
    folder = exported(tmp_path / "llama", tmp_path / "out", {"grow_into": into})
    model = opened(folder)
    tokens = torch.randint(0, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = llama(input_ids=tokens).logits
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        tokens[0, 5] = 320
        pixels = torch.randn(1, 1, 1, 3, 56, 56)
        seen = model(input_ids=tokens, pixel_values=pixels).logits
        embedded = model.get_input_embeddings()(tokens)
        expected = llama(inputs_embeds=embedded).logits
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.04), ("fp8", 0.15)])
def test_quantized_exports_load_and_stay_near(kind, bound, plain_case, tmp_path):
    """The bound is a share of the logits' spread."""
    source = save_folder(tmp_path / "hf", mllama_weights())
    exact = logits(opened(exported(source, tmp_path / "exact")), plain_case)
    folder = exported(source, tmp_path / kind, quantize=kind)
    stored = load_folder(folder)["language_model.model.layers.0.mlp.up_proj.weight"]
    assert stored.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    off = (logits(opened(folder), plain_case) - exact).abs().mean() / exact.std()
    print(kind, float(off))
    assert 1e-4 < off < bound
    with pytest.raises(ConversionError, match="quantized weights cannot be"):
        convert_hf(FromHf(folder, tmp_path / "again"))


@pytest.mark.parametrize(
    ("name", "prompt", "stage", "form"),
    [
        ("sft", "realtime", None, "realtime"),
        ("sft", "realtime", "sft", "chat"),  # --stage sft
        ("cooking", "realtime", "cooking", "realtime"),
        ("cooking", "chat", "cooking", "chat"),
        ("realtime_sft", "chat", "realtime_sft", "realtime"),  # runs made before
        ("cooking", "chat", "pt1", "pretrain"),  # --stage pt1
        ("cooking", "chat", "baking", None),
        ("imported", "pretrain", None, None),
    ],
)
def test_an_export_says_its_prompt_form(name, prompt, stage, form, tmp_path):
    config = Config(stage=StageConfig(name=name, prompt=prompt))
    files = HfFiles(config, {}, "moss", stage, None, tmp_path, tmp_path)
    assert files.prompt_form == form
