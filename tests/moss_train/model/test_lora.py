"""Adapters: at first they change nothing, and merged they are the same model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moss_train.config import AdapterConfig, ParallelConfig
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import export, fill
from moss_train.model.frame_plan import plan_frames
from moss_train.model.hf_mapping import unmatched_targets
from moss_train.model.lora import is_adapter, merge
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model_config import ModelConfig
from moss_train.train.param_groups import freeze
from tests.moss_train.model.build import preset

LORA = AdapterConfig("lora", rank=4, alpha=6.0)


def logits(model: MossVideo) -> Tensor:
    """Of 24 tokens with two frames."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 320, (24,), generator=generator)
    image_at, ones = torch.tensor([5, 12]), torch.ones(2, dtype=torch.long)
    frames = plan_frames(
        torch.zeros(2, dtype=torch.long),
        image_at,
        [24],
        24,
        tiles=ones,
        max_tiles=1,
        attend_all=False,
    )
    frames.states = torch.randn(2, 5, 64, generator=generator)
    with torch.no_grad():
        return model.chunks[0](PackedText(tokens, [24]), frames)


def built(config: ModelConfig, groups, adapter: AdapterConfig | None) -> MossVideo:
    model = MossVideo(config, ParallelConfig(), groups, adapter)
    fill(model, random_reader(config, seed=3))
    return model


def test_an_adapter_starts_without_effect_and_merges_exactly(groups):
    config = preset("tiny")
    plain, adapted = built(config, groups, None), built(config, groups, LORA)
    assert torch.equal(logits(adapted), logits(plain))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_b"):
                assert not parameter.any()
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    changed = logits(adapted)
    assert (changed - logits(plain)).abs().max() > 0.01

    exported = export(adapted)
    assert exported.keys() == export(plain).keys()
    # By hand, from B and A: the query rows of a fused projection, and a layer of one projection.
    own = {name: p.detach() for name, p in adapted.named_parameters()}
    before = export(plain)
    for hf, ours in (
        ("0.mlp.down_proj", "0.mlp.linear_fc2"),
        ("1.cross_attn.q_proj", "1.linear_q"),
    ):
        prefix = f"decoder.layers.{ours}"
        update = 1.5 * own[f"{prefix}.lora_b"] @ own[f"{prefix}.lora_a"]
        name = f"language_model.model.layers.{hf}.weight"
        torch.testing.assert_close(exported[name] - before[name], update, rtol=1e-4, atol=1e-6)

    reloaded = MossVideo(config, ParallelConfig(), groups)
    fill(reloaded, lambda name, _: exported[name])
    torch.testing.assert_close(logits(reloaded), changed, rtol=1e-4, atol=1e-5)
    merge(adapted.layers)
    torch.testing.assert_close(logits(adapted), changed, rtol=1e-4, atol=1e-5)
    assert not any(is_adapter(name) for name, _ in adapted.named_parameters())


def test_targets_choose_layers(groups):
    adapter = AdapterConfig("lora", rank=2, target=["*.linear_qkv", "decoder.layers.5.mlp.*"])
    model = built(preset("tiny"), groups, adapter)
    found = {name for name, _ in model.named_parameters() if is_adapter(name)}
    layers = [f"decoder.layers.{i}.attention.linear_qkv" for i in (0, 2, 3, 5)]
    layers += ["decoder.layers.5.mlp.linear_fc1", "decoder.layers.5.mlp.linear_fc2"]
    assert found == {f"{layer}.lora_{letter}" for layer in layers for letter in "ab"}
    counts = freeze(model, ["*"])
    rows = (64 + 128) * 4 + (64 + 256) + (128 + 64)  # in + out of each, times the rank
    assert counts.trained["decoder"] == counts.patterns["*.lora_?"] == 2 * rows
    assert counts.trained["vision"] == counts.total["vision"] > 0


def test_a_target_must_match_a_linear_layer_of_the_decoder():
    patterns = ["decoder.layers.*", "*.linear_kv", "vision.*", "*.q_norm", "decoder.output"]
    assert unmatched_targets(preset("tiny"), patterns) == patterns[2:]


@pytest.mark.parametrize("seed", [3, 4])
def test_a_is_drawn_by_name(groups, seed: int):
    model = MossVideo(preset("tiny"), ParallelConfig(), groups, LORA)
    read = random_reader(preset("tiny"), seed)
    fill(model, read)
    own = dict(model.named_parameters())
    name = "language_model.model.layers.0.self_attn.q_proj.lora_a"
    drawn = own["decoder.layers.0.attention.linear_qkv.lora_a"]
    assert torch.equal(drawn, read(name, torch.Size([4, 64])))
    assert drawn.std().item() == pytest.approx(64**-0.5, rel=0.2)
