"""Quantized weights against the full ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inference.engine.engine import Engine
from inference.engine.four_bit import round_to_four_bits
from inference.engine.load import load_model
from inference.engine.quantize import quantize_decoder
from inference.engine.quantized_linear import QuantizedLinear
from inference.kernels.choose import Kernels
from tests.inference.engine.streams import AnyRows, Player, make_stream, offline, play
from tests.inference.tiny import tiny_model


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.05), ("fp8", 0.2), ("int4", 0.4)])
def test_logits_move_little_and_alike_in_every_form_of_a_pass(kind: str, limit: float) -> None:
    stream = make_stream(1)
    wanted = offline(tiny_model(), stream)
    model = tiny_model()
    quantize_decoder(model, kind)
    packed, fixed = (Engine(model, max_tokens=128) for _ in range(2))
    players = [Player(packed, stream)]
    play(packed, players)
    # Layers that read the same input become one.
    chosen = Kernels(attention=AnyRows)
    fixed.graph_runner = fixed.make_graph_runner(chosen, graphs=False, compile=False)
    players.append(Player(fixed, stream))
    play(fixed, players[1:])
    errors = torch.stack([logits - wanted[i] for i, logits in players[0].logits.items()])
    relative = (errors.norm() / wanted[list(players[0].logits)].norm()).item()
    assert 1e-4 < relative < limit
    for i, logits in players[0].logits.items():
        torch.testing.assert_close(players[1].logits[i], logits, atol=1e-4, rtol=0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_a_row_of_zeros_stays_one(dtype, kind: str) -> None:
    """Of fp16 the smallest number is 6e-8, so that a scale of almost nothing is none."""
    linear = nn.Linear(128, 4, bias=False, dtype=dtype)
    linear.weight.data[1], linear.weight.data[2] = 0, torch.finfo(dtype).tiny
    full = QuantizedLinear.of(linear, kind).full()
    assert full[1].eq(0).all()
    assert full[2].abs().le(2 * torch.finfo(dtype).tiny).all()


def test_frames_keep_full_weights_and_another_kind_is_refused() -> None:
    model = tiny_model()
    quantize_decoder(model, "int8")
    decoder = model.model.language_model
    for layer in decoder.cross:
        attention = decoder.cross_attention(layer)
        assert isinstance(attention.k_proj, nn.Linear)
        assert isinstance(attention.q_proj, QuantizedLinear)
    assert isinstance(model.lm_head, QuantizedLinear)
    with pytest.raises(ValueError, match="quantize=int3: allowed: int8, fp8, int4"):
        quantize_decoder(model, "int3")


@pytest.mark.parametrize("width", [1, 100, 128, 300])
def test_weights_that_4_bits_hold_are_kept_exactly(width: int) -> None:
    """Whole numbers from -8 to 7, or from 8 to -7, times a power of two for each group."""
    numbers = torch.randint(-8, 8, (5, width), generator=torch.Generator().manual_seed(0))
    numbers[:, ::128] = -8  # the first of each group
    groups = torch.arange(width) // 128
    sign = torch.tensor([1, -1, 1, -1, 0])[:, None]
    weight = (numbers * sign * torch.exp2(groups - 3.0)).float()
    linear = nn.Linear(width, 5, bias=False)
    linear.weight = nn.Parameter(weight)
    quantized = QuantizedLinear.of(linear, "int4")
    assert torch.equal(quantized.full(), weight)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(quantized(x), x @ weight.T)
    whole_groups = -(-width // 128)
    assert quantized.weight.nbytes == 5 * whole_groups * 64
    assert quantized.scale.shape == (5, whole_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bits_are_as_near_as_16_even_steps_can_be(dtype) -> None:
    """Of a normal distribution the best 16 even steps leave a mean square of 0.01154 (J. Max,
    "Quantizing for minimum distortion", 1960); a scale for each group can only leave less. Of each
    group no other scale leaves much less than the one that was taken."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = nn.Linear(1024, 64, bias=False)
    linear.weight = nn.Parameter(weight)
    restored = QuantizedLinear.of(linear, "int4").full().double()
    groups = weight.double().unflatten(1, (-1, 128))
    error = (restored.unflatten(1, (-1, 128)) - groups).square().mean(-1)
    assert error.mean() < 0.01154
    widest = groups.abs().amax(-1, keepdim=True)
    best = torch.full_like(error, torch.inf)
    for factor in torch.linspace(-0.14, 0.14, 281).double():
        if factor != 0:
            numbers = (groups / (widest * factor)).round().clamp(-8, 7)
            best = torch.minimum(best, (numbers * widest * factor - groups).square().mean(-1))
    assert error.mean() < 1.05 * best.mean()


def test_weights_are_rounded_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 200, generator=torch.Generator().manual_seed(0))
    whole = round_to_four_bits(weight)
    monkeypatch.setattr("inference.engine.four_bit.CHUNK", 2 * 200)
    for one, other in zip(round_to_four_bits(weight), whole, strict=True):
        assert torch.equal(one, other)


def test_two_ranks_have_the_numbers_of_one_where_they_share_whole_groups(tmp_path) -> None:
    text = tiny_model().config.text_config.to_dict()
    model = tiny_model(text_config=text | {"intermediate_size": 512})
    model.save_pretrained(tmp_path)
    whole, *ranks = (
        load_model(tmp_path, "cpu", quantize="int4", rank=rank, ranks=ranks)
        for rank, ranks in ((0, 1), (0, 2), (1, 2))
    )

    def mlp(model):
        return model.model.language_model.layers[0].mlp

    wanted = mlp(whole).down_proj.full()
    assert torch.equal(torch.cat([mlp(rank).down_proj.linear.full() for rank in ranks], 1), wanted)
    wanted = mlp(whole).up_proj.full()
    assert torch.equal(torch.cat([mlp(rank).up_proj.full() for rank in ranks]), wanted)
