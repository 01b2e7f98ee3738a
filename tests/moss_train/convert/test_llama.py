"""Cross-attention grown onto a text-only Llama: at first it is that text model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moss_train.config import ConfigError, ParallelConfig
from moss_train.convert.llama import check_llama, initial_reader
from moss_train.convert.weights import fill
from moss_train.model.frame_plan import plan_frames
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model_config import InitConfig, ModelConfig, TextConfig
from tests.moss_train.model.build import preset

IMAGE = 320  # the first row beyond the vocabulary
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}


def save_llama(folder: Path, tied: bool, shard: str) -> LlamaForCausalLM:
    """Four layers of tiny's sizes with uneven weights, as transformers writes them."""
    torch.manual_seed(2)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters=SCALING,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    llama.save_pretrained(folder, max_shard_size=shard)
    return llama.eval()


def grown(folder: Path) -> ModelConfig:
    """tiny has 6 layers, of which 1 and 4 attend frames; its gates are not 0."""
    return replace(preset("tiny"), init=InitConfig(gate=0.5, from_llama=str(folder)))


@pytest.mark.parametrize(("tied", "shard"), [(False, "100KB"), (True, "5GB")])
def test_the_first_logits_are_the_text_model_s(groups, tmp_path, tied: bool, shard: str):
    llama = save_llama(tmp_path, tied, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "100KB")
    model = grown(tmp_path)
    assert list(check_llama(tmp_path, model)) == []
    ours = MossVideo(model, ParallelConfig(), groups)
    fill(ours, initial_reader(model, seed=5))
    weights = dict(ours.named_parameters())
    assert {float(p) for name, p in weights.items() if name.endswith("_gate")} == {0.0}
    embedding = weights["decoder.embedding.weight"]
    assert embedding.shape[0] == 328
    assert embedding[IMAGE:].std().item() == pytest.approx(0.02, rel=0.2)

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, IMAGE, (24,), generator=generator)
    image_at = torch.tensor([5, 12])
    tokens[image_at] = IMAGE
    frames = plan_frames(
        torch.zeros(2, dtype=torch.long), image_at, [24], 24, tiles=torch.ones(2, dtype=torch.long),
        max_tiles=1, attend_all=False,
    )  # fmt: skip
    frames.states = torch.randn(2, 5, 64, generator=generator)
    with torch.no_grad():
        logits = ours.chunks[0](PackedText(tokens, [24]), frames)
        expected = llama(inputs_embeds=embedding[tokens][None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

    weights["decoder.layers.1.attn_gate"].data.fill_(2.0)
    with torch.no_grad():
        opened = ours.chunks[0](PackedText(tokens, [24]), frames)
    assert (opened[:5] - expected[:5]).abs().max() < 1e-4  # before the first frame
    assert (opened[5:] - expected[5:]).abs().max() > 0.01


def test_what_does_not_fit_is_named(tmp_path):
    save_llama(tmp_path, False, "5GB")
    model = grown(tmp_path)
    text = replace(model.text, num_layers=8, mlp_size=96)
    assert list(check_llama(tmp_path, replace(model, text=text))) == [
        f"model.text.num_layers=8: the text model {tmp_path} needs 6",
        f"model.text.mlp_size=96: the text model {tmp_path} needs 128",
    ]
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="damaged or cut short"):
        list(check_llama(tmp_path, model))
    with pytest.raises(ConfigError, match="nowhere: cannot be read"):
        list(check_llama(tmp_path / "nowhere", model))


def test_a_text_model_without_scaling_is_factor_one(tmp_path):
    save_llama(tmp_path, False, "5GB")
    path = tmp_path / "config.json"
    text = path.read_text().replace('"llama3"', '"default"')
    path.write_text(text)
    fields = TextConfig(**vars(grown(tmp_path).text))
    fields.rope_scaling = replace(fields.rope_scaling, factor=1.0)
    assert list(check_llama(tmp_path, replace(grown(tmp_path), text=fields))) == []
