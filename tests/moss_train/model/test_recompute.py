"""What a backward pass keeps, and that what it computes again is the same."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moss_train.config import Config, ParallelConfig
from moss_train.model.frame_plan import plan_frames
from moss_train.model.mlp import swiglu
from moss_train.model.norms import _RMSNorm
from moss_train.model.packed_text import PackedText
from moss_train.model.projector import pooled_tokens
from moss_train.model.recompute import recomputable, recomputed
from moss_train.train.activations import Batch, DecoderActivations
from tests.kept import Kept
from tests.moss_train.model.build import preset, random_model

ROWS = 6


def kept_by(layer: torch.nn.Module, run) -> int:
    """Bytes that the graph of `run()` keeps."""
    kept = Kept(layer.parameters())
    with kept:
        out = run()
    assert out.requires_grad
    return kept.now


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_selective_keeps_no_output_of_a_norm_or_activation_in_the_decoder(groups, dtype) -> None:
    size = {"fp32": 4, "bf16": 2}[dtype]
    tiny = preset("tiny", dtype=dtype)
    kept = {}
    for recompute in ("none", "selective"):
        layer: Any = random_model(tiny, groups, recompute=recompute).chunks[0].layers["0"]
        x = torch.randn(ROWS, 1, tiny.text.hidden_size).to(layer.mlp_norm.weight.dtype)
        x.requires_grad_()
        kept[recompute] = kept_by(layer, lambda: layer.mlp(layer.mlp_norm(x)))  # noqa: B023
    width, inner = tiny.text.hidden_size, tiny.text.mlp_size
    scale = ROWS * 4
    # x and the norm's factors, the norm's output, gate and up, their product.
    assert kept["none"] == scale + ROWS * size * (2 * width + 3 * inner)
    assert kept["selective"] == scale + ROWS * size * (width + 2 * inner)


def test_selective_keeps_no_output_of_a_norm_or_activation_in_the_tower(groups) -> None:
    tiny = preset("tiny")
    kept = {}
    for recompute in ("none", "selective"):
        layer = random_model(tiny, groups, recompute=recompute).encoder.vision.local_layers[0]
        x = torch.randn(1, ROWS, tiny.vision.hidden_size, requires_grad=True)
        kept[recompute] = kept_by(layer, lambda: layer(x, None))  # noqa: B023
    width, inner = tiny.vision.hidden_size, tiny.vision.mlp_size
    assert kept["none"] - kept["selective"] == 4 * ROWS * (2 * width + inner)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient_of_the_tower(groups, recompute) -> None:
    tiny = preset("tiny", dtype="bf16")
    pixels = torch.randn(2, 1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    gradients = []
    for kind in ("none", recompute):
        encoder = random_model(tiny, groups, recompute=kind).encoder
        encoder(pixels.bfloat16(), torch.ones(2, dtype=torch.long)).square().mean().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_all_readers_of_what_is_recomputed_share_one_computation() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    x = torch.randn(3, 4, requires_grad=True)
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    y = recomputable(True, double, x)
    with recomputed(y):
        out = linear(y, weights[0]) + linear(y, weights[1])
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2
    for weight in weights:
        torch.testing.assert_close(weight.grad, (2 * x).detach().sum(0).expand(5, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_that_of_torch_and_keeps_its_input_alone(dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, 1, 32).to(dtype).requires_grad_()
    gradient = torch.randn(ROWS, 1, 16).to(dtype)
    kept = Kept()
    with kept:
        got = swiglu(hidden)
    assert kept.now == hidden.nbytes
    gate, up = hidden.chunk(2, dim=-1)
    expected = silu(gate) * up
    assert torch.equal(got, expected)
    mine, theirs = (torch.autograd.grad(y, hidden, gradient)[0] for y in (got, expected))
    assert torch.equal(mine, theirs)
    exact = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, exact)


def test_the_norm_in_bf16_is_rounded_once() -> None:
    """Against fp64: output and gradients are within one rounding."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 64).bfloat16().requires_grad_()
    weight = torch.rand(64).bfloat16().requires_grad_()
    gradient = torch.randn(5, 3, 64).bfloat16()
    kept = Kept([weight])
    with kept:
        got = _RMSNorm.apply(x, weight, 1e-5)
    assert kept.now == x.nbytes + 15 * 4  # and a factor for each position
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm(exact[0], (64,), exact[1], 1e-5)
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(got, (x, weight), gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2**-7, atol=1e-3)


class Made(TorchDispatchMode):
    """Storages that operators make for tensors of some sizes, in elements."""

    def __init__(self, sizes: set[int]):
        super().__init__()
        self.sizes = sizes
        self.storages: list[weakref.ref] = []

    @property
    def alive(self) -> int:
        """Of them, those that somebody still holds."""
        return sum(storage() is not None for storage in self.storages)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() in self.sizes:
                storage = x.untyped_storage()
                if storage._cdata not in known:
                    self.storages.append(weakref.ref(storage))
        return out


# Tokens of sequences, and frames of each, evenly over it: a stream, which is computed in blocks;
# chats, which are padded side by side.
LAYOUTS = {"blocks": ([500], 70), "padded": ([41, 37, 43], 3)}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("form", LAYOUTS)
def test_masks_are_made_once_for_all_layers_and_kept_until_the_backward_pass(
    groups, form, recompute
) -> None:
    """As many bytes as are predicted. In bf16, where no attention of a CPU makes scores of their
    size."""
    lengths, each = LAYOUTS[form]
    tiny = preset("tiny", dtype="bf16")
    tiny.text = replace(tiny.text, cross_attention_layers=[0, 1, 3, 4])
    places = [frame * (length // each) for length in lengths for frame in range(each)]
    rows = torch.arange(len(lengths)).repeat_interleave(each)
    frames = plan_frames(rows, torch.tensor(places), lengths, sum(lengths))
    assert (frames.padded is not None) == (form == "padded")
    keys = pooled_tokens(tiny)
    frames.states = torch.randn(len(rows), keys, tiny.text.hidden_size).bfloat16().requires_grad_()
    planned: list[Any] = [frames.padded] if frames.padded else frames.blocks
    masked = [part for part in planned if part.mask is not None]
    sizes = [part.mask.numel() * keys * 2 for part in masked]  # two query heads share a KV head
    assert sizes
    chunk = random_model(tiny, groups, recompute=recompute).chunks[0]
    with Made(set(sizes)) as made:
        out = chunk(PackedText(torch.ones(sum(lengths), dtype=torch.long), lengths), frames)
        assert len(made.storages) == made.alive == len(sizes)
        out.float().square().mean().backward()
        assert len(made.storages) == len(sizes)
    del out
    assert made.alive == 0
    config = Config(model=tiny, parallel=ParallelConfig(recompute=recompute))
    config.stage.train, config.data.max_tiles = ["*"], 1
    pairs = sum(part.pairs for part in masked)
    without, kept = (
        DecoderActivations(config, Batch(1, 1, 1, n, 1, 1)).kept(0, tiny.text.num_layers)
        for n in (0, pairs)
    )
    assert kept - without == 2 * sum(sizes)
