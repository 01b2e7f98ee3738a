"""An engine on each kind of attention gives what it gives on torch's: streamed, with a ring that
has wrapped, and in one pass."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from inference.engine.attend import Attend, Sdpa, attend_by
from inference.engine.choose_attend import choose, make
from inference.engine.engine import Engine
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels import npu_attention
from inference.kernels.choose import Kernels
from tests.inference.engine.streams import Player, make_stream, play
from tests.inference.tiny import tiny_config, tiny_model
from tests.stand_ins import stand_in

HEADS = {"text": 128, "tower": 80, "frames": 128}
RELEASES = ("flash_attn_2", "flash_attn_4", "npu")


@pytest.fixture(scope="module")
def model() -> MossVideoForConditionalGeneration:
    """Heads of 16: the NPU's are multiples of it. In doubles: what differs is not rounding."""
    vision = {**tiny_config().vision_config.to_dict(), "hidden_size": 64}
    return tiny_model(vision_config={**vision, "vision_output_dim": 192}).double()


def kind_of(release: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Attend, Any]:
    module = stand_in(monkeypatch, release, **settings)
    return make("npu" if release == "npu" else "flash"), module


def played(model: Any, attend: Attend, fixed: bool, **options: Any) -> list[dict[int, Tensor]]:
    """Logits of two streams side by side."""
    engine = Engine(model, max_tokens=128, max_sessions=2, **options)
    attend_by(model, attend)
    engine.packed.attend = attend
    if fixed:
        kernels = Kernels(attention=attend.fixed)
        engine.graph_runner = engine.make_graph_runner(kernels, graphs=False, compile=False)
    players = [Player(engine, make_stream(seed, frames=9)) for seed in (1, 2)]
    play(engine, players)
    return [player.logits for player in players]


@pytest.mark.parametrize(
    ("release", "options"),
    [
        *((release, {"window": 3}) for release in RELEASES),
        ("flash_attn_2", {"window": 16}),
        ("flash_attn_2", {"window": 3, "sinks": 1}),
        ("npu", {"window": 3, "sinks": 1}),
    ],
)
def test_a_stream_is_what_it_is_on_torch_s(model, release, options, monkeypatch):
    attend, module = kind_of(release, monkeypatch, OTHER_DTYPES=True)
    fixed = release == "npu" and "sinks" in options  # passes of fixed shape are its own, too
    wanted = played(model, Sdpa(), False, **options)
    module.calls.clear()
    got = played(model, attend, fixed, **options)
    assert len(module.calls) > 100
    for ours, right in zip(got, wanted, strict=True):
        assert ours.keys() == right.keys()
        largest = max(logits.abs().max() for logits in right.values())
        for at, logits in ours.items():
            assert (logits - right[at]).abs().max() <= 1e-6 * largest


@pytest.mark.parametrize("release", RELEASES)
def test_tokens_before_the_first_frame_attend_all_of_a_pass(model, release, monkeypatch):
    """As the published code does offline."""
    attend, _ = kind_of(release, monkeypatch, OTHER_DTYPES=True)
    options = {"window": 16, "tokens_before_first_frame": "attend_all"}
    wanted, got = (played(model, kind, False, **options) for kind in (Sdpa(), attend))
    largest = max(logits.abs().max() for logits in wanted[0].values())
    for at, logits in got[0].items():
        assert (logits - wanted[0][at]).abs().max() <= 1e-6 * largest


REFUSED = {
    ("flash", "cpu", "bf16", ""): "runs on cuda, not on cpu",
    ("flash", "cuda", "fp32", ""): "computes in bf16 or fp16, not in fp32",
    ("flash", "cuda", "bf16", "a tower"): "takes no mask, which a tower needs",
    ("flash", "cuda", "bf16", ""): "flash-attn is not installed (pip install 'moss-train[flash]')",
    ("npu", "cuda", "bf16", ""): "runs on npu, not on cuda",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_what_cannot_be_had_is_refused_with_what_can(asked, monkeypatch):
    monkeypatch.setattr(
        "data_pipeline.attention_kinds.find_spec", lambda name: True if name == "torch" else None
    )
    kind, device, dtype, mask = asked
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    said = f"attention={kind}: {REFUSED[asked]}: use auto or sdpa"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        choose(kind, torch.device(device), dtypes[dtype], HEADS, mask)


def test_auto_is_the_npu_s_own_where_it_can_compute(monkeypatch):
    stand_in(monkeypatch, "npu")

    class Npu:  # torch knows no such device without the package
        type = "npu"

    def chosen(dtype: torch.dtype, **sizes: int) -> str:
        return choose("auto", Npu(), dtype, HEADS | sizes, "")  # type: ignore[arg-type]

    assert chosen(torch.bfloat16) == "npu"
    assert chosen(torch.float32) == "sdpa"
    assert chosen(torch.bfloat16, tower=88) == "sdpa"
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert chosen(torch.bfloat16) == "sdpa"


def test_the_npu_s_stand_in_refuses_what_the_real_one_does(monkeypatch):
    stand_in(monkeypatch, "npu")
    q, kv = torch.zeros(1, 4, 3, 32).bfloat16(), torch.zeros(1, 2, 8, 32).bfloat16()
    call = npu_attention.fused
    hidden = torch.zeros(1, 1, 3, 8, dtype=torch.bool)
    call("BNSD", q, kv, kv, atten_mask=hidden, actual_seq_lengths_kv=[5])
    for wrong, options in (
        ("query is torch.float32", {"q": q.float(), "k": kv.float(), "v": kv.float()}),
        ("heads of 24", {"q": q[..., :24], "k": kv[..., :24], "v": kv[..., :24]}),
        ("heads per KV head", {"q": q[:, :3]}),
        ("a query sees nothing", {"atten_mask": ~hidden}),
        ("atten_mask", {"atten_mask": hidden[..., :5]}),
        ("lengths", {"actual_seq_lengths_kv": [9]}),
        ("no list", {"actual_seq_lengths_kv": torch.tensor([5])}),
        ("2048", {"atten_mask": hidden, "sparse_mode": 3}),
    ):
        with pytest.raises(RuntimeError, match=wrong):
            call("BNSD", **{"q": q, "k": kv, "v": kv} | options)
