"""An export whose layers others wrap in modules of theirs: FSDP on two ranks, recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from tests.torchrun import run_ranks
from tests.workers.fsdp import batch, make


@pytest.mark.parametrize(("version", "form"), [("1", "plain"), ("2", "plain"), ("2", "recompute")])
def test_fsdp_of_all_layers_learns_what_one_process_does(
    tiny: Path, tmp_path: Path, version: str, form: str
) -> None:
    """All that `_no_split_modules` names, as accelerate wraps by default."""
    result = run_ranks("tests/workers/fsdp.py", 2, str(tiny), version, form, out=tmp_path / "out")
    layers = 0
    for rank in range(2):
        loss, wanted, layers = result.load("losses", rank)
        assert loss == pytest.approx(wanted, rel=1e-6)
    config = MossVideoForConditionalGeneration.from_pretrained(tiny).config
    vision = config.vision_config
    assert layers == config.text_config.num_hidden_layers + (
        vision.num_hidden_layers + vision.num_global_layers
    )
    found, wanted_ones = result.load("gradients")
    assert set(found) == set(wanted_ones)
    for name, wanted in wanted_ones.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7, msg=name)
    moved = [name for name, grad in wanted_ones.items() if grad.abs().max() > 0]
    assert any("cross_attn.k_proj" in name for name in moved)


class Wrapper(nn.Module):
    """As torch.compile's, or DeepSpeed's."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: object) -> Tensor:
        out: Tensor = self.layer(*args)
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)


@pytest.mark.parametrize("wrap", [Wrapper, checkpoint_wrapper])
def test_wrapped_layers_say_what_bare_ones_say(tiny: Path, wrap: object) -> None:
    """Of text alone, too: no layer is passed by that is not one of frames."""
    assert callable(wrap)
    plain, model = make(str(tiny), False), make(str(tiny), False)
    layers = model.model.language_model.layers
    for number, layer in enumerate(list(layers)):
        layers[number] = wrap(layer)
    given = batch(plain, 0)
    text = {"input_ids": given["input_ids"].clamp(20, 60)}
    for inputs in (given, text):
        wanted = plain(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-5, atol=1e-6)
    bare = plain.model.language_model.embed_tokens(text["input_ids"])
    assert not torch.allclose(plain.lm_head(bare), plain(**text).logits)
