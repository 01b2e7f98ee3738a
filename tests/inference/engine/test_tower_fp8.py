"""The vision tower in FP8: what it computes, what becomes of its layers, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from data_pipeline import devices
from data_pipeline.fp8 import Fp8
from inference.engine import tower_fp8
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.tower_fp8 import Fp8Linear, Fp8MLP, round_tower
from inference.hf.vision_moss_video import VisionLayer
from tests.inference.tiny import SIZE, tiny_model

OFF = 2.0**-4  # a rounded number is off by this share of it at most


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts of proofs are kept there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def rounded(weight: Tensor) -> Tensor:
    """By the published format, in fp64: 3 bits behind the point, up to 448, steps from 2^-9 on."""
    exact = weight.double()
    scale = torch.exp2((448 / exact.abs().amax(-1, keepdim=True)).log2().floor())
    scaled = exact * scale
    step = torch.exp2(scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (scaled / step).round() * step / scale


def test_a_layer_multiplies_rounded_rows_with_rounded_weights() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 48), torch.randn(2, 5, 64)
    found = Fp8Linear(layer, Fp8())(x)
    wanted = linear(rounded(x), rounded(layer.weight), layer.bias.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (found - layer(x)).abs().max() > 1e-3


def test_features_are_those_of_full_weights_but_for_the_rounding() -> None:
    pixels = torch.randn(3, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    model = tiny_model()
    plain = torch.stack(Engine(model).encode_pixels(pixels))
    engine = Engine(model, vision_dtype="fp8")
    found = torch.stack(engine.encode_pixels(pixels))
    error = (found - plain).norm() / plain.norm()
    assert 1e-3 < error < 2 * OFF
    layers = [m for m in model.modules() if isinstance(m, VisionLayer)]
    assert layers
    assert all(isinstance(layer.mlp, Fp8MLP) for layer in layers)
    again = torch.stack(Engine(model, vision_dtype="fp8").encode_pixels(pixels))
    assert torch.equal(again, found)  # nothing is rounded twice
    weights = layers[0].mlp.fc1
    assert isinstance(weights, Fp8Linear)
    assert weights.values.itemsize == 1


def test_norms_write_what_products_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding for queries, keys and values; GELU rounds for the second half of an MLP."""
    calls: list[str] = []

    def part(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            calls.append(name)
            return function(*given)

        return call

    parts = {name: part(name, getattr(Fp8(), name)) for name in ("round", "norm", "gelu")}
    monkeypatch.setattr(tower_fp8, "fp8_of", lambda _: Fp8(**parts))
    model = tiny_model()
    engine = Engine(model, vision_dtype="fp8")
    layers = len([m for m in model.modules() if isinstance(m, VisionLayer)])
    assert calls == ["round"] * 6 * layers  # the weights
    calls.clear()
    engine.encode_pixels(torch.zeros(1, 1, 3, SIZE, SIZE))
    assert calls == ["norm", "round", "norm", "gelu"] * layers


def test_products_that_do_not_prove_right_leave_the_tower_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half(*given: Any, **options: Any) -> Tensor:
        return 0.5 * real(*given, **options)

    real = torch._scaled_mm
    monkeypatch.setattr("data_pipeline.fp8.is_accelerator", lambda _: True)
    monkeypatch.setattr(torch, "_scaled_mm", half)
    model = tiny_model()
    round_tower(model)
    assert not [m for m in model.modules() if isinstance(m, Fp8Linear)]
    assert "FP8 (product) is not used on CPU: 19 x 32 x 64: the output differs" in caplog.text


def test_what_cannot_be_had_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="vision_dtype=int8: choose one of auto, fp8"):
        Engine(tiny_model(), vision_dtype="int8")
    with pytest.raises(ValueError, match="vision_dtype=fp8: CPU does not multiply in FP8"):
        load_engine(tiny, device="cpu", vision_dtype="fp8")
    monkeypatch.setattr(devices, "has_fp8", lambda _: True)
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    refusal = "vision_dtype=fp8: needs the whole vision tower on one rank, not on 2"
    with pytest.raises(ValueError, match=refusal):
        load_engine(tiny, device="cpu", vision_dtype="fp8")
    odd = tiny_model()
    odd.config.vision_config.intermediate_size = 72
    refusal = "vision_dtype=fp8: vision_config.intermediate_size=72: must be a multiple of 16"
    with pytest.raises(ValueError, match=re.escape(refusal)):
        round_tower(odd)
