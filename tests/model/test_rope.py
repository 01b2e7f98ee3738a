"""Rotary frequencies against transformers' llama3 rope."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

from moss_train.config import RopeScalingConfig, TextConfig
from moss_train.model.rope import inverse_frequencies, rotary_angles


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
    angles = rotary_angles(text, positions)[:, 0, 0]
    torch.testing.assert_close(angles.cos(), cos[0], rtol=0, atol=2e-2)  # 1 ulp of 131071 rad
    torch.testing.assert_close(angles[:3].cos(), cos[0, :3], rtol=0, atol=1e-3)
    torch.testing.assert_close(angles[:3].sin(), sin[0, :3], rtol=0, atol=1e-3)
