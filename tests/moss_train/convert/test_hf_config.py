"""Reading a checkpoint's config.json, in all the forms it has had."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from transformers import MllamaConfig

from moss_train.config import ConfigError
from moss_train.convert.hf_config import model_config_from_hf
from moss_train.model_config import ModelConfig, RopeScalingConfig
from tests.moss_train.model.build import preset

LLAMA = MllamaConfig(
    text_config={
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    vision_config={"image_size": 560},
    dtype="bfloat16",
).to_dict()  # what transformers 5 writes; without rope_parameters its default has no scaling


def as_transformers_4() -> dict:
    """The same as transformers 4 wrote it."""
    old = copy.deepcopy(LLAMA)
    rope = old["text_config"].pop("rope_parameters")
    old["text_config"]["rope_theta"] = rope.pop("rope_theta")
    old["text_config"]["rope_scaling"] = rope
    old["torch_dtype"] = old.pop("dtype")
    return old


@pytest.mark.parametrize("form", [LLAMA, as_transformers_4()], ids=["5", "4"])
def test_llama_vision_is_the_11b_preset_without_what_moss_adds(form):
    model = model_config_from_hf(form)
    expected = preset("11b")
    assert model.text == expected.text
    assert model.vision == replace(expected.vision, full_attention=False)
    assert model.projector.pool == "none"
    assert not model.cross_attention_rope
    assert (model.tokens_before_first_frame, model.dtype) == ("attend_all", "bf16")


@pytest.mark.parametrize(
    "keys", [{"pool_mode": "average", "pool_stride": 4}, {"pool": {"mode": "average", "stride": 4}}]
)
def test_pooling_keys_mean_moss_video(keys):
    model = model_config_from_hf({**LLAMA, **keys})
    assert model == replace(preset("11b"), name="imported", tokens_before_first_frame="attend_all")


def test_golden_form_is_the_tiny_preset(shared):
    model = model_config_from_hf(shared / "golden")
    tiny = preset("tiny")
    assert (model.vision, model.text, model.projector) == (tiny.vision, tiny.text, tiny.projector)
    assert (model.name, model.dtype, model.tokens_before_first_frame) == (
        "golden",
        "fp32",
        "attend_all",
    )
    assert model.cross_attention_rope


def test_rope_without_scaling_has_factor_one():
    plain = as_transformers_4()
    plain["text_config"]["rope_scaling"] = None
    assert model_config_from_hf(plain).text.rope_scaling == RopeScalingConfig(factor=1.0)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("text_config", "hidden_size"), None, "text_config.hidden_size is missing"),
        (("text_config", "hidden_size"), "big", "text_config.hidden_size is 'big'"),
        (("text_config", "cross_attention_layers"), [3, "8"], "text_config.cross_attention_layers"),
        (("text_config", "rope_parameters", "rope_type"), "yarn", "rope_parameters.rope_type"),
        (("text_config", "tie_word_embeddings"), True, "text_config.tie_word_embeddings"),
        (("vision_config",), None, "vision_config is missing"),
        (("vision_config", "hidden_act"), "relu", "vision_config.hidden_act is 'relu'"),
        (("vision_config", "vision_output_dim"), 1, "vision_config.vision_output_dim is 1"),
        (("vision_config", "supported_aspect_ratios"), [[1, 1]], "supported_aspect_ratios"),
        (("image_token_index",), 128264, "image_token_index is 128264"),
        (("dtype",), "float16", "dtype is 'float16'"),
        (("pool_mode",), "median", "pool_mode is 'median'"),
        (("blind_rows",), "none", "blind_rows is 'none'"),
    ],
)
def test_errors_name_file_and_key(path, value, named, tmp_path):
    broken = copy.deepcopy(LLAMA)
    part = broken
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    file = tmp_path / "config.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(ConfigError) as caught:
        model_config_from_hf(tmp_path)
    assert str(file) in str(caught.value)
    assert named in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        model_config_from_hf(tmp_path / "nowhere")


def test_the_11b_preset_is_the_default_configuration():
    assert preset("11b") == ModelConfig()


def test_an_export_of_an_earlier_version_keeps_what_it_said():
    for said in ("zero", "attend_all"):
        assert model_config_from_hf(LLAMA | {"blind_rows": said}).tokens_before_first_frame == said
