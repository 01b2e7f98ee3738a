"""Quantized weights against the full ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inference.engine.engine import Engine
from inference.engine.quantize import QuantizedLinear, quantize_decoder
from tests.inference.engine.streams import Player, make_stream, offline, play
from tests.inference.tiny import tiny_model


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.05), ("fp8", 0.2)])
def test_logits_move_little(kind: str, limit: float) -> None:
    stream = make_stream(1)
    wanted = offline(tiny_model(), stream)
    model = tiny_model()
    quantize_decoder(model, kind)
    player = Player(Engine(model, max_tokens=128), stream)
    play(player.engine, [player])
    errors = torch.stack([logits - wanted[i] for i, logits in player.logits.items()])
    relative = (errors.norm() / wanted[list(player.logits)].norm()).item()
    assert 1e-4 < relative < limit


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_each_weight_is_off_by_half_a_step(rows: int, dtype, kind: str, step: float) -> None:
    """int8: half of 1/127 of the row's largest weight; fp8 e4m3: half of its last of three bits."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False, dtype=dtype)
    quantized = QuantizedLinear.of(linear, kind)
    full = linear.weight.float()
    restored = quantized.weight.float() * quantized.scale.float()[:, None]
    size = full.abs() if kind == "fp8" else full.abs().amax(1, keepdim=True)
    room = 1.02 if dtype is torch.float32 else 1.3  # the scale is rounded to 8 bits, too
    assert ((restored - full).abs() <= step * room * size + 1e-4).all()
    x = torch.randn(rows, 64, dtype=dtype)
    torch.testing.assert_close(quantized(x).float(), x.float() @ restored.T, atol=0.02, rtol=0.02)


def test_frames_keep_full_weights_and_another_kind_is_refused() -> None:
    model = tiny_model()
    quantize_decoder(model, "int8")
    decoder = model.model.language_model
    for layer in decoder.cross:
        attention = decoder.cross_attention(layer)
        assert isinstance(attention.k_proj, nn.Linear)
        assert isinstance(attention.q_proj, QuantizedLinear)
    assert isinstance(model.lm_head, QuantizedLinear)
    with pytest.raises(ValueError, match="quantize=int4: allowed: int8, fp8"):
        quantize_decoder(model, "int4")
