"""The model presets in conf/model."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from moss_train.config import ParallelConfig
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import export, fill
from moss_train.model.moss_video import MossVideo
from moss_train.model_config import ModelConfig
from tests.moss_train.model.build import PRESETS, preset

NAMES = ("toy", "tiny", "11b", "90b")


@pytest.mark.parametrize("name", NAMES)
def test_preset_fits_together(name):
    model = preset(name)
    assert model.name == name
    assert model.vision.image_size % model.vision.patch_size == 0
    assert model.vision.grid % model.projector.stride == 0
    assert model.text.hidden_size % model.text.num_heads == 0
    assert model.text.num_heads % model.text.num_kv_heads == 0
    assert max(model.text.cross_attention_layers) < model.text.num_layers
    assert max(model.vision.intermediate_layers) < model.vision.num_layers


@pytest.mark.parametrize("name", ["11b", "90b"])
def test_released_sizes_are_written_out_in_full(name):
    written = OmegaConf.to_container(OmegaConf.load(PRESETS / f"{name}.yaml"))
    assert written == OmegaConf.to_container(OmegaConf.structured(preset(name)))


def test_90b_is_the_11b_with_a_larger_decoder():
    small, large = preset("11b"), preset("90b")
    assert large.vision == small.vision
    assert large.text.head_dim == small.text.head_dim == 128
    assert large.text.cross_attention_layers == list(range(3, 100, 5))
    assert large.text.num_layers - len(large.text.cross_attention_layers) == 80  # Llama-3.1-70B


def weights(model: ModelConfig, groups, seed: int) -> dict[str, torch.Tensor]:
    """Seeded weights by HF name, through a model."""
    built = MossVideo(model, ParallelConfig(), groups)
    fill(built, random_reader(model, seed))
    return export(built)


def test_random_weights_follow_the_seed_and_the_preset(groups):
    toy = preset("toy")
    first, again, other = (weights(toy, groups, seed) for seed in (1, 1, 2))
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    drawn = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first[drawn], other[drawn])
    assert first[drawn].std().item() == pytest.approx(toy.init.std, rel=0.02)
    # What adds to the residual stream: smaller, by the square root of twice the layers.
    added = first["language_model.model.layers.0.mlp.down_proj.weight"]
    assert added.std().item() == pytest.approx(toy.init.std / 4, rel=0.02)
    names = first["language_model.model.embed_tokens.weight"]
    assert names.std().item() == pytest.approx(1.0, rel=0.02)
    assert first["language_model.model.layers.1.cross_attn_attn_gate"].item() == 1.0
    assert (first["language_model.model.norm.weight"] == 1).all()
    assert (first["multi_modal_projector.bias"] == 0).all()
