"""Kernels of training against fp64, in Triton's interpreter; and what uses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.kernel_proof import difference
from moss_train import hardware
from moss_train.model import choose_kernels
from moss_train.model.choose_kernels import Trials
from moss_train.model.frame_plan import plan_frames
from moss_train.model.kernels import Kernels
from moss_train.model.loss import LossOptions, find_targets
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model.weight_gradient import accumulate
from moss_train.model_config import TextConfig
from tests.gates import with_gates_together
from tests.moss_train.model.build import preset, random_model
from tests.torchrun import run_ranks

triton_kernels = pytest.importorskip("moss_train.model.triton_kernels")
ALL = {name: getattr(triton_kernels, name) for name in ("swiglu", "rotate", "statistics")}
ALL["accumulate"] = accumulate
# No width is a power of two; rows are of several blocks and a part of one.
SIZES = TextConfig(vocab_size=4500, hidden_size=30, num_heads=3, num_kv_heads=1, mlp_size=1100)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ALL),
        # Triton's interpreter cannot compute with bf16; torch on a CPU not accumulate it.
        *((name, torch.float16) for name in ALL if name != "accumulate"),
    ],
)
def test_a_kernel_and_its_gradients_are_those_of_fp64(name: str, dtype: torch.dtype) -> None:
    cases = list(getattr(Trials(SIZES, dtype, torch.device("cpu")), name)(ALL[name]))
    assert len(cases) > (name != "swiglu")
    for case in cases:
        assert difference(case) == "", case.name


def test_what_is_wrong_is_seen() -> None:
    trials = Trials(SIZES, torch.float32, torch.device("cpu"))
    (case,) = trials.swiglu(lambda x: 1.001 * triton_kernels.swiglu(x))
    assert "the output differs" in difference(case)
    case, *_ = trials.rotate(lambda x, cos, sin: triton_kernels.rotate(x, cos, -sin))
    assert "differs" in difference(case)


def loss_and_gradients(model: MossVideo, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of eight tokens with two frames. As in a job, each parameter has a main gradient."""
    named = dict(model.named_parameters())
    for parameter in named.values():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    marks, lengths = torch.tensor([1, 4]), [8]
    tokens = torch.tensor([20, 320, 21, 22, 320, 23, 24, 25])
    labels = tokens.masked_fill(tokens == 320, -100)
    frames = plan_frames(torch.zeros(2, dtype=torch.long), marks, lengths, 8)
    pixels = torch.randn(2, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    frames.states = model.encoder(pixels, torch.ones(2, dtype=torch.long))
    targets = find_targets(labels, lengths, LossOptions(11))
    loss = model.chunks[0](PackedText(tokens, lengths), frames, targets, torch.tensor(5.0))
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in named.items():
        added = getattr(parameter, "grad_added_to_main_grad", False)
        found[name] = getattr(parameter, "main_grad" if added else "grad")
        assert found[name].any(), name
    return found


@pytest.fixture(scope="module")
def exact(groups) -> dict[str, Tensor]:
    """Plain torch's in fp64. Gates' gradients are small sums of large terms, of which plain torch
    in fp32 is nearly as far as is allowed below."""
    model = random_model(preset("tiny", dtype="fp32"), groups)
    model.encoder.double()
    for chunk in model.chunks:
        chunk.double()
    to_fp32 = Tensor.float
    with pytest.MonkeyPatch.context() as patch:  # what the model computes in fp32 at least
        patch.setattr(Tensor, "float", lambda x: x if x.dtype is torch.float64 else to_fp32(x))
        found = loss_and_gradients(model, torch.float64)
    assert {x.dtype for x in found.values()} == {torch.float64}
    return found


@pytest.mark.parametrize(
    ("names", "recompute"),
    [(ALL, "none"), (["swiglu", "accumulate"], "selective"), (["rotate", "accumulate"], "full")],
)
def test_a_model_with_kernels_computes_what_fp64_does(groups, exact, names, recompute) -> None:
    tiny = preset("tiny", dtype="fp32")
    kernels = Kernels(**{name: ALL[name] for name in names})
    found = loss_and_gradients(random_model(tiny, groups, kernels, recompute=recompute))
    found, exact = with_gates_together(found), with_gates_together(exact)
    for name, expected in exact.items():
        assert (found[name] - expected).abs().max() < 1e-5 * expected.abs().max(), name


def test_on_a_cpu_and_where_it_is_asked_for_all_is_plain_torch() -> None:
    assert choose_kernels.choose_kernels(preset("tiny")) == Kernels()


def test_only_what_is_right_is_used(groups, tmp_path: Path, monkeypatch, caplog) -> None:
    """As on a GPU, whose part alone is made up: that there is one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "on_accelerator", lambda: True)
    monkeypatch.setattr(choose_kernels.devices, "has_triton", lambda _: True)
    monkeypatch.setattr(triton_kernels, "swiglu", lambda x: x[..., : x.shape[-1] // 2] * 1.0)
    model = preset("tiny", dtype="fp32")
    expected = Kernels(**ALL | {"swiglu": None})
    for _ in range(2):  # the second time by the verdicts that were kept
        assert choose_kernels.choose_kernels(model) == expected
    (first, second) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert first == second
    assert first.startswith("the training kernel swiglu is not used on CPU: ")
    model.kernels = "torch"
    assert choose_kernels.choose_kernels(model) == Kernels()


def test_what_is_not_right_on_one_rank_is_used_on_none(tmp_path: Path) -> None:
    result = run_ranks("tests/workers/agreement.py", 2, "kernels", out=tmp_path)
    assert result.load_all("found") == [[["a", "c"], [], [], ["a"], []]] * 2
    said, why = ([line.partition("WARNING ")[2] for line in result.stderr(rank).splitlines()
                  if "WARNING " in line] for rank in (0, 1))  # fmt: skip
    assert said == [
        "the kernel b: is not right on rank 1: no rank uses it",
        "the kernel large: is not right on rank 1: no rank uses it",
        "the kernel: not tried on this rank: CUDA out of memory.",
    ]
    assert why == [
        "b is not used on a device of rank 1: it differs",
        "the kernel large: not tried on this rank: CUDA out of memory.",
    ]
