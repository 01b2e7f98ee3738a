"""The cross-attention's core against a dense softmax in fp64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from moss_train.model.cross_attention import attend_blocks, attend_flex, attend_padded
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
    seed: int, longest: int, most: int, attend_all: bool, rounded: bool = False
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
    frames = plan(layout, TILES, attend_all, rounded)
    return inputs, frames, allowed.flatten(1).repeat_interleave(PATCHES, 1)


def whole(core, query: Tensor, key: Tensor, value: Tensor, frames: FramePlan) -> Tensor:
    """`core` of the attending tokens, zero for the others: `[S, heads, D]`."""
    rows = frames.attending
    return rows.scatter(core(rows.gather(query), key, value, frames))


@pytest.mark.parametrize("rounded", [False, True])
def test_padded_batches_give_the_dense_softmax_and_its_gradients(rounded):
    checked = 0
    for seed in range(20):
        inputs, frames, allowed = random_inputs(seed, 30, 8, seed % 2 == 1, rounded)
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
    inputs, frames, allowed = random_inputs(seed, longest, most, attend_all, rounded)
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_flex_gives_the_dense_softmax(seed, attend_all):
    inputs, frames, allowed = random_inputs(seed, 30, 8, attend_all)
    query, key, value = inputs
    got = whole(attend_flex, query.float(), key.float(), value.float(), frames)
    expected = softmax_reference(query, key, value, allowed)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
