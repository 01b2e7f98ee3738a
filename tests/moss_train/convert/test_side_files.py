"""Tokenizer, configs, image processor and chat templates beside the weights: what they say is what
a conversion keeps, or they are refused with both values."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data_pipeline.tokens import build_toy_tokenizer
from moss_train.checkpoint_dir import write_complete
from moss_train.config import ConfigError
from moss_train.convert.source import ConversionError
from moss_train.convert.to_hf import ToHf, convert_megatron
from moss_train.convert.to_megatron import FromHf, convert_hf
from tests.golden.make_mllama import CONFIG
from tests.moss_train.convert.sources import mllama_weights, save_folder
from tests.torchrun import REPO

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
PROCESSOR = {
    "image_processor_type": "MllamaImageProcessor", "do_convert_rgb": True, "do_resize": True,
    "size": {"height": 28, "width": 28}, "resample": 2, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "do_pad": True, "max_image_tiles": 4,
    "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD,
}  # fmt: skip


def write(path: Path, values: Any) -> None:
    path.write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An Mllama of 512 tokens with its tokenizer and image processor."""
    weights, config = mllama_weights(), copy.deepcopy(CONFIG)
    config["text_config"]["vocab_size"] = config["image_token_index"] = 512
    generator = torch.Generator().manual_seed(1)
    for name, rows in (("model.embed_tokens", 520), ("lm_head", 512)):
        shape = (rows, weights[f"language_model.{name}.weight"].shape[1])
        weights[f"language_model.{name}.weight"] = torch.randn(shape, generator=generator)
    folder = save_folder(tmp_path_factory.mktemp("beside") / "hf", weights, config)
    build_toy_tokenizer(folder, ["a man"], 512)
    write(folder / "preprocessor_config.json", PROCESSOR)
    return folder


def changed(source: Path, out: Path, file: str, change: dict | str) -> Path:
    """A copy (links) in which one file has other values."""
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).hardlink_to(path)
    if isinstance(change, dict) and (out / file).exists():
        change = json.loads((out / file).read_text()) | change
    (out / file).unlink(missing_ok=True)
    write(out / file, change)
    return out


def exported(source: Path, out: Path, **options) -> tuple[Path, list[str]]:
    """An export after an import, and the lines of both."""
    lines = convert_hf(FromHf(source, out / "megatron"))
    wanted = ToHf(out / "megatron", out / "hf", REPO / "inference/hf", **options)
    return out / "hf", lines + convert_megatron(wanted)


@pytest.mark.parametrize("target", ["moss", "mllama"])
@pytest.mark.parametrize(("file", "tiles"), [("preprocessor", 4), ("preprocessor", 2), ("v5", 3)])
def test_tiles_are_those_of_the_source(target, file, tiles, source, tmp_path):
    """transformers 5 writes the image processor into processor_config.json."""
    values: dict[str, Any] = {"max_image_tiles": tiles}
    name = "preprocessor_config.json"
    if file == "v5":
        name, values = "processor_config.json", {"image_processor": PROCESSOR | values}
    given = changed(source, tmp_path / "given", name, values)
    if file == "v5":
        (given / "preprocessor_config.json").unlink()
    folder, _ = exported(given, tmp_path, target=target)
    made = json.loads((folder / "preprocessor_config.json").read_text())
    assert made["max_image_tiles"] == tiles
    assert made["image_mean"] == pytest.approx(OPENAI_CLIP_MEAN)


def test_two_files_that_mean_the_same_are_no_conflict(source, tmp_path):
    """A setting that is null, numbers that were saved in fp32."""
    means = np.array(OPENAI_CLIP_MEAN, np.float32).tolist()
    values = PROCESSOR | {"image_mean": means, "do_convert_rgb": None}
    assert means != OPENAI_CLIP_MEAN
    given = changed(
        source, tmp_path / "given", "processor_config.json", {"image_processor": values}
    )
    assert convert_hf(FromHf(given, tmp_path / "out"))


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("preprocessor_config.json", {"image_mean": [0.5] * 3}, r"image_mean is \[0.5, 0.5, 0.5\]"),
        ("preprocessor_config.json", {"image_std": [1, 1, 1]}, r"image_std is \[1, 1, 1\]"),
        ("preprocessor_config.json", {"size": {"height": 56, "width": 28}}, "image_size is 28"),
        ("preprocessor_config.json", {"resample": 3}, "resample is 3"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is false"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("preprocessor_config.json", {"max_image_tiles": 9}, "max_image_tiles is 9, it must be"),
        (
            "processor_config.json",  # what transformers 5 reads first
            {"image_processor": PROCESSOR | {"max_image_tiles": 2}},
            r"processor_config.json: image_processor.max_image_tiles is 2, in preprocessor.* 4",
        ),
        ("preprocessor_config.json", {"image_std": ["1"] * 3}, r"image_std is \['1', '1', '1'\]"),
        ("preprocessor_config.json", {"rescale_factor": None}, "rescale_factor is None"),
        ("preprocessor_config.json", {"rescale_factor": "1/255"}, "rescale_factor is 1/255"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop is true"),
        ("generation_config.json", {"eos_token_id": "7"}, "eos_token_id is '7': it must be the id"),
        ("generation_config.json", {"suppress_tokens": [1, "b"]}, r"suppress_tokens is \[1, 'b'\]"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"512": "<|image|>"}}, "map ids to tok"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<|image|>"]}, "map ids to tokens"),
        ("config.json", {"image_token_index": 510}, r"index is 510, .*<\|image\|> is 512"),
        ("config.json", {"silence_token_id": 3}, r"silence_token_id is 3, .*<\|silence\|> is \d+"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"513": {"content": "<|clip|>", "special": True}}},
            r"<\|clip\|> is 513 \(None\) beside tokenizer.json .*save_pretrained",
        ),
        ("added_tokens.json", {"<|image|>": 515}, r"<\|image\|> is 515 \(512\) beside"),
    ],
)
def test_two_values_for_one_thing_are_refused(file, change, says, source, tmp_path):
    given = changed(source, tmp_path / "given", file, change)
    with pytest.raises(ConversionError, match=says) as caught:
        convert_hf(FromHf(given, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ends_of_texts_are_told_and_kept_in_range(source, tmp_path):
    change = {"eos_token_id": [7, 9000], "bos_token_id": 0, "pad_token_id": -1}
    change |= {"suppress_tokens": [5, 600], "forced_eos_token_id": 601}
    given = changed(source, tmp_path / "given", "generation_config.json", change)
    folder, lines = exported(given, tmp_path)
    said = "\n".join(lines)
    end = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id("<|end_of_text|>")
    assert f"eos_token_id is [7, 9000], the tokenizer's <|end_of_text|> is {end}" in said
    assert "eos_token_id is 9000, the embedding has 520 rows" in said
    assert "suppress_tokens is 600, the embedding has 520 rows" in said
    assert "forced_eos_token_id is 601, the embedding has 520 rows" in said
    made = json.loads((folder / "generation_config.json").read_text())
    assert made == {"eos_token_id": [7], "bos_token_id": 0, "suppress_tokens": [5]}


def test_another_class_of_image_processor_is_told(source, tmp_path):
    given = changed(
        source,
        tmp_path / "given",
        "preprocessor_config.json",
        {"image_processor_type": "CLIPImageProcessor"},
    )
    lines = convert_hf(FromHf(given, tmp_path / "out"))
    assert any("image_processor_type is CLIPImageProcessor: training" in line for line in lines)


def test_a_tokenizer_of_other_ids_is_no_tokenizer_of_the_run(source, tmp_path):
    """As many tokens, other places."""
    other = build_toy_tokenizer(tmp_path / "other", ["a man"], 512)
    text = (other / "tokenizer.json").read_text()
    swapped = text.replace("<|silence|>", "<|x|>").replace("<|eot_id|>", "<|silence|>")
    (other / "tokenizer.json").write_text(swapped.replace("<|x|>", "<|eot_id|>"))
    with pytest.raises(ConfigError, match=r"<\|silence\|> is \d+, not \d+.*--tokenizer"):
        exported(source, tmp_path, tokenizer=other)
    # An earlier version's checkpoint does not say which one it was, but has it beside it.
    checkpoint = tmp_path / "megatron"
    run = json.loads((checkpoint / "run.json").read_text())
    write(checkpoint / "run.json", run | {"tokenizer": None})
    (checkpoint / "complete.json").unlink()
    write_complete(checkpoint)
    again = ToHf(checkpoint, tmp_path / "again", REPO / "inference/hf", tokenizer=other)
    with pytest.raises(ConversionError, match=r"<\|silence\|> is \d+, in the run's tokenizer"):
        convert_megatron(again)


def test_a_tokenizer_without_marks_is_told(source, tmp_path):
    text = (source / "tokenizer.json").read_text()
    given = changed(
        source, tmp_path / "given", "tokenizer.json", text.replace("<|image|>", "<|other|>")
    )
    _, lines = exported(given, tmp_path)
    assert sum("has no token <|image|>" in line for line in lines) == 2  # import and export


def test_a_token_whose_spaces_are_read_otherwise_is_refused(source, tmp_path):
    """transformers takes tokenizer_config.json's rules, training tokenizer.json's."""
    token = {"content": "<|eot_id|>", "lstrip": True, "rstrip": False, "special": True}
    number = Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id("<|eot_id|>")
    change = {"added_tokens_decoder": {str(number): token}}
    given = changed(source, tmp_path / "given", "tokenizer_config.json", change)
    texts = [folder / "tokenizer.json" for folder in (source, given)]
    ids = [
        AutoTokenizer.from_pretrained(text.parent).encode("a <|eot_id|>", add_special_tokens=False)
        for text in texts
    ]
    assert ids[0] != ids[1]
    with pytest.raises(ConversionError, match=r"<\|eot_id\|> has lstrip=True \(False\)"):
        exported(given, tmp_path)
    token["lstrip"] = False
    write(given / "tokenizer_config.json", change)
    exported(given, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token": "<|new|>"},
        {"pad_token": {"__type": "AddedToken", "content": "<|new|>", "special": True}},
        {"extra_special_tokens": ["<|eot_id|>", "<|new|>"]},
        {"extra_special_tokens": {"mark_token": "<|new|>"}},
    ],
)
def test_a_token_that_only_a_setting_names_is_told(change, source, tmp_path):
    given = changed(source, tmp_path / "given", "tokenizer_config.json", change)
    assert AutoTokenizer.from_pretrained(given).convert_tokens_to_ids("<|new|>") == 513
    lines = [line for line in exported(given, tmp_path)[1] if "<|new|>" in line]
    (line,) = lines
    assert line.startswith(f"{given}/tokenizer_config.json: {next(iter(change))} names <|new|>")


def test_the_settings_of_a_tokenizer_have_the_names_that_transformers_4_knows(source, tmp_path):
    """transformers 5 saves others, upon which 4 fails."""
    change = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<|eot_id|>", "<|silence|>"],
    }
    given = changed(source, tmp_path / "given", "tokenizer_config.json", change)
    folder, _ = exported(given, tmp_path)
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == change["extra_special_tokens"]
    assert "extra_special_tokens" not in saved
    wanted = AutoTokenizer.from_pretrained(given).all_special_tokens
    assert AutoTokenizer.from_pretrained(folder).all_special_tokens == wanted


def test_a_cache_of_the_source_that_exports_do_not_take_is_left_out(source, tmp_path):
    change = {"cache_implementation": "static", "temperature": 0.6, "do_sample": True}
    given = changed(source, tmp_path / "given", "generation_config.json", change)
    folder, _ = exported(given, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.generation_config.temperature == 0.6
    assert model.generate(torch.tensor([[3, 9]]), max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": TEMPLATE}]},
        ),
        ("chat_template.json", {"chat_template": TEMPLATE}),
        ("chat_template.jinja", TEMPLATE),
    ],
)
def test_exports_write_the_prompts_of_training(file, change, source, tmp_path):
    """Wherever a source has a template of its own, and a line says that it is left out."""
    given = changed(source, tmp_path / "given", file, change)
    folder, lines = exported(given, tmp_path)
    assert sum("chat template" in line and file in line for line in lines) >= 2
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    turns = [{"role": "user", "content": "hello"}]
    wanted = "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    for one in (processor, processor.tokenizer):
        made = one.apply_chat_template(turns, tokenize=False)
        assert made.removeprefix("<|begin_of_text|>") == wanted
