"""Rotary embedding against transformers' llama3 rope."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding, apply_rotary_pos_emb

from moss_train.model.rope import Rotation, inverse_frequencies
from moss_train.model_config import RopeScalingConfig, TextConfig


def reference(text: TextConfig) -> MllamaRotaryEmbedding:
    """transformers' rotary embedding of the same sizes."""
    scaling = text.rope_scaling
    return MllamaRotaryEmbedding(
        MllamaTextConfig(
            hidden_size=text.hidden_size,
            num_attention_heads=text.num_heads,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": text.rope_theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            },
        )
    )


@pytest.mark.parametrize(
    "scaling",
    [RopeScalingConfig(), RopeScalingConfig(4.0, 1.0, 2.0, 64), RopeScalingConfig(factor=1.0)],
)
def test_frequencies_are_those_of_transformers(scaling):
    text = TextConfig(rope_scaling=scaling)
    expected = reference(text).inv_freq
    torch.testing.assert_close(inverse_frequencies(text), expected, rtol=1e-6, atol=0)


def test_angles_are_those_of_transformers_at_far_positions():
    text = TextConfig()
    positions = torch.tensor([0, 1, 8191, 131071])
    cos, sin = reference(text)(torch.zeros(1), positions[None])
    rotation = Rotation.of(text, positions, torch.float32)
    ours_cos, ours_sin = rotation.cos[:, 0], rotation.sin[:, 0]
    torch.testing.assert_close(ours_cos, cos[0], rtol=0, atol=2e-2)  # 1 ulp of 131071 rad
    torch.testing.assert_close(ours_cos[:3], cos[0, :3], rtol=0, atol=1e-3)
    torch.testing.assert_close(ours_sin[:3], sin[0, :3], rtol=0, atol=1e-3)


def test_heads_turn_as_in_transformers():
    text = TextConfig()
    positions = torch.tensor([0, 3, 1000])
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 3, text.head_dim, generator=generator)  # [1, heads, S, D]
    expected = apply_rotary_pos_emb(query, key, *reference(text)(query, positions[None]))
    rotation = Rotation.of(text, positions, torch.float32)
    for x, turned in zip((query, key), expected, strict=True):
        got = rotation(x[0].transpose(0, 1))  # [S, heads, D]
        torch.testing.assert_close(got.transpose(0, 1), turned[0], rtol=0, atol=1e-5)
