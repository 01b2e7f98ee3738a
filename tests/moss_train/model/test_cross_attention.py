"""The cross-attention's core against a dense softmax in fp64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import TensorPropertySource
from torch.nn.attention.flex_attention import create_block_mask

from moss_train.model import flex_attention
from moss_train.model.cross_attention import attend_blocks, attend_padded
from moss_train.model.flex_attention import attend_flex
from moss_train.model.frame_plan import FramePlan
from tests.moss_train.model.test_frame_plan import dense, plan, random_layout

HEADS, KV_HEADS, WIDTH, PATCHES, TILES = 4, 2, 8, 3, 2


def softmax_reference(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Plain attention over all keys; `allowed` `[S, F * T * P]`; zero where nothing is."""
    groups = HEADS // KV_HEADS
    key, value = (x.flatten(0, 1).repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("shd,khd->hsk", query, key) / WIDTH**0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    blind = ~allowed.any(-1)[:, None]
    probabilities = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("hsk,khd->shd", probabilities, value)


def random_inputs(
    seed: int, longest: int, most: int, attend_all: bool, **options: Any
) -> tuple[list[Tensor], FramePlan, Tensor]:
    """[query, key, value] (fp64) of a random layout, its plan and its dense mask."""
    rng = random.Random(seed)
    allowed = torch.zeros(1)
    while not allowed.any():
        layout = random_layout(rng, longest, most, TILES)
        allowed = dense(layout, TILES, attend_all)[0]
    length, count, _ = allowed.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    key_shape = (count, TILES * PATCHES, KV_HEADS, WIDTH)
    inputs = [draw(length, HEADS, WIDTH), draw(*key_shape), draw(*key_shape)]
    frames = plan(layout, TILES, attend_all, **options)
    return inputs, frames, allowed.flatten(1).repeat_interleave(PATCHES, 1)


def whole(core, query: Tensor, key: Tensor, value: Tensor, frames: FramePlan) -> Tensor:
    """`core` of the attending tokens, zero for the others: `[S, heads, D]`."""
    rows, frames = frames.attending, frames.with_masks(HEADS // KV_HEADS, PATCHES, query.dtype)
    return rows.scatter(core(rows.gather(query), key, value, frames))


@pytest.mark.parametrize("rounded", [False, True])
def test_padded_batches_give_the_dense_softmax_and_its_gradients(rounded):
    checked = 0
    for seed in range(20):
        inputs, frames, allowed = random_inputs(seed, 30, 8, seed % 2 == 1, rounded=rounded)
        if frames.padded is None:
            continue
        checked += 1
        compare(lambda q, k, v, f=frames: whole(attend_padded, q, k, v, f), inputs, allowed)
    assert checked >= 5


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize(("longest", "most"), [(12, 4), (30, 8), (600, 40)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_blocks_give_the_dense_softmax_and_its_gradients(longest, most, seed, attend_all, rounded):
    inputs, frames, allowed = random_inputs(seed, longest, most, attend_all, rounded=rounded)
    compare(lambda q, k, v: whole(attend_blocks, q, k, v, frames), inputs, allowed)


def compare(core, inputs: list[Tensor], allowed: Tensor) -> None:
    """Output and gradients of `core` against the reference's, in fp64."""
    gradient = torch.randn(inputs[0].shape, dtype=torch.float64)
    results = []
    for attend in (core, lambda q, k, v: softmax_reference(q, k, v, allowed)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = attend(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, gradient)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_fp32_blocks_are_close_to_the_fp64_softmax():
    inputs, frames, allowed = random_inputs(5, 600, 40, attend_all=False)
    query, key, value = inputs
    got = whole(attend_blocks, query.float(), key.float(), value.float(), frames)
    expected = softmax_reference(query, key, value, allowed)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    """torch refuses FlexAttention's backward pass on a CPU; what it is made of can run there."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *heads: None)


UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@UNCOMPILED
@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("seed", [3])
def test_flex_gives_the_dense_softmax_and_its_gradients(seed, attend_all, flex_on_a_cpu):
    inputs, frames, allowed = random_inputs(seed, 600, 90, attend_all, flex=PATCHES)

    def core(query: Tensor, key: Tensor, value: Tensor, frames: FramePlan) -> Tensor:
        assert frames.flex is not None
        return attend_flex(query, key, value, frames.flex)

    compare(lambda q, k, v: whole(core, q, k, v, frames), inputs, allowed)


@pytest.mark.parametrize("seed", [3, 4, 5, 6])
def test_flex_computes_the_blocks_of_torch_s_own_mask(seed):
    """And none that is attended is left out; torch finds them from each (query, key) pair."""
    _, frames, _ = random_inputs(seed, 600, 90, attend_all=seed % 2 == 0, flex=PATCHES)
    flex = frames.flex
    assert flex is not None
    ours = flex.block_mask
    theirs = create_block_mask(ours.mask_mod, None, None, *flex.sizes, device="cpu")
    parts = [(theirs.full_kv_num_blocks, theirs.full_kv_indices)]
    parts.append((theirs.kv_num_blocks, theirs.kv_indices))
    wholly, partly = (picked(*part) for part in parts)
    assert torch.equal(picked(ours.full_kv_num_blocks, ours.full_kv_indices), wholly)
    computed = picked(ours.kv_num_blocks, ours.kv_indices)
    assert not (partly & ~computed).any()
    assert (computed | wholly).sum() <= 1.3 * (partly | wholly).sum()
    for rows, columns in (
        ((ours.kv_num_blocks, ours.kv_indices), (ours.q_num_blocks, ours.q_indices)),
        (
            (ours.full_kv_num_blocks, ours.full_kv_indices),
            (ours.full_q_num_blocks, ours.full_q_indices),
        ),
    ):
        assert torch.equal(picked(*rows), picked(*columns).T)


def picked(counts: Any, columns: Any) -> Tensor:
    """The matrix of a list of columns for each row: bool `[rows, columns]`."""
    taken = torch.arange(columns.shape[-1]) < counts[0, 0, :, None]
    return torch.zeros(columns.shape[-2:], dtype=torch.bool).scatter(1, columns[0, 0].long(), taken)


@UNCOMPILED
def test_flex_is_compiled_twice_whatever_the_lengths(monkeypatch, flex_on_a_cpu):
    """On a GPU; here without code for one, but through the same graphs. Later in a run a graph more
    would take the kernel that keeps all scores, or end it."""
    torch._dynamo.reset()
    compiled = torch.compile(
        flex_attention.flex_attention, dynamic=True, fullgraph=True, backend="aot_eager"
    )
    monkeypatch.setattr(flex_attention, "flex_attention", compiled)
    torch._dynamo.utils.counters.clear()
    for tokens, count in ((140, 30), (270, 45), (400, 70), (530, 25)):
        starts = [2 * frame for frame in range(count)]
        layout = {"lengths": [tokens], "rows": [0] * count, "start": starts}
        layout |= {"stop": [tokens] * count, "tiles": [1 + frame % 2 for frame in range(count)]}
        frames = plan(layout, TILES, False, flex=PATCHES)
        shapes = (len(frames.tokens), HEADS), *(2 * [(count, TILES * PATCHES, KV_HEADS)])
        query, key, value = (torch.ones(*shape, 8, requires_grad=True) for shape in shapes)
        assert frames.flex is not None
        attend_flex(query, key, value, frames.flex).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_flash_attention_4_gets_what_it_can_take(monkeypatch, flex_on_a_cpu):
    """Where lengths vary, it takes tensors and their sizes alone, no other number that a mask knows
    (has_unsupported_captured_scalars in torch). Here the graphs that torch would give it."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    called = torch.compile(
        flex_attention.flex_attention, dynamic=True, fullgraph=True, backend=backend
    )
    monkeypatch.setattr(flex_attention, "flex_attention", called)
    layout = {"lengths": [300], "rows": [0] * 60, "start": [3 * n for n in range(60)]}
    layout |= {"stop": [300] * 60, "tiles": [1 + n % 2 for n in range(60)]}
    for patches in (PATCHES, PATCHES + 2):  # another number, by which dynamo lets it vary
        flex = plan(layout, TILES, False, flex=patches).flex
        assert flex is not None
        query, key = (
            torch.ones(*shape, 8)
            for shape in ((flex.sizes[0], HEADS), (60, TILES * patches, KV_HEADS))
        )
        attend_flex(query, key, key, flex, "flash")
    for graph in graphs:
        (node,) = (
            n for n in graph.graph.nodes if n.target is torch.ops.higher_order.flex_attention
        )
        *_, options, _, known = node.args
        assert options["BACKEND"] == "FLASH"
        values = [x.meta["example_value"] for x in known]
        assert sum(isinstance(x, Tensor) for x in values) == 5
        for x in (x for x in values if not isinstance(x, Tensor)):
            sources = x.node.shape_env.var_to_sources[x.node.expr]
            assert any(isinstance(source, TensorPropertySource) for source in sources)


def test_gradients_of_frames_that_many_blocks_see_are_added_exactly():
    """bf16 sums of 120 of them would be off by some per cent."""
    layout = {"lengths": [1920], "rows": [0] * 120, "start": [16 * n for n in range(120)]}
    layout |= {"stop": [1920] * 120, "tiles": [1] * 120}
    frames = plan(layout, 1, attend_all=False)
    assert len(frames.blocks) > 10
    generator = torch.Generator().manual_seed(1)
    shapes = ((len(frames.tokens), 2, 8), (120, PATCHES, 1, 8), (120, PATCHES, 1, 8))
    numbers = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    gradients: list[Tensor] = []
    for dtype in (torch.float64, torch.bfloat16):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in numbers)
        masked = frames.with_masks(2, PATCHES, dtype)
        gradients += torch.autograd.grad(attend_blocks(q, k, v, masked).sum(), v)
    exact, ours = gradients
    assert (ours.double() - exact).norm() < 3e-3 * exact.norm()
