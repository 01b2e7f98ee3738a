"""Attention with rounded lengths: the numbers of exact ones, in few shapes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from moss_train.model.attention import attend_packed
from moss_train.model.frame_plan import FramePlan, plan_frames
from moss_train.model.packed_text import PackedText
from moss_train.model.shape_grid import round_up, rounds_lengths
from tests.moss_train.model.build import preset

MICROBATCHES = 120


def test_lengths_are_rounded_to_powers_of_two_and_the_halves_between():
    wanted = [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert [round_up(n) for n in range(1, 14)] == wanted
    assert [round_up(n, 64) for n in (1, 64, 65, 97, 2368, 4096)] == [64, 64, 96, 128, 3072, 4096]
    assert [round_up(n, 64, 4) for n in (1, 64, 65, 97, 2368, 4096)] == [
        64,
        64,
        80,
        112,
        2560,
        4096,
    ]
    assert all(n <= round_up(n, 32) <= max(32, 1.5 * n) for n in range(1, 5000))
    assert all(n <= round_up(n, 32, 4) <= max(32, 1.25 * n) for n in range(1, 5000))


def test_lengths_are_exact_on_a_cpu_unless_they_are_to_be_rounded():
    model = preset("tiny")
    asked = [rounds_lengths(replace(model, round_lengths=x)) for x in ("auto", "on", "off")]
    assert asked == [False, True, False]


@pytest.mark.parametrize("spans", [[5], [64], [70, 66, 3, 2, 2], [300, 20, 18]])
def test_text_of_rounded_batches_has_the_numbers_of_exact_ones(spans):
    tokens = torch.zeros(sum(spans), dtype=torch.long)
    torch.manual_seed(len(spans))
    heads = [torch.randn(len(tokens), n, 8, dtype=torch.float64) for n in (4, 2, 2)]
    gradient, results = torch.randn_like(heads[0]), []
    for rounded in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in heads)
        out = attend_packed(q, k, v, PackedText(tokens, spans, rounded))
        results.append((out, *torch.autograd.grad(out, (q, k, v), gradient)))
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-11)


Sample = tuple[int, list[int]]  # tokens, places of `<|image|>` tokens


def image(rng: random.Random) -> Sample:
    return 7 + rng.randint(20, 600), [6]


def video(rng: random.Random) -> Sample:
    frames = rng.randint(8, 64)
    return 6 + frames + rng.randint(30, 600), list(range(6, 6 + frames))


def realtime(rng: random.Random) -> Sample:
    place, places = rng.randint(10, 80), []
    for _ in range(rng.randint(30, 256)):
        places.append(place)
        place += 2 if rng.random() < 0.7 else rng.randint(4, 21)
    return place, places


def any_kind(rng: random.Random) -> Sample:
    return rng.choice((image, video))(rng)


def cross_shapes(frames: FramePlan) -> list[tuple]:
    """(batch, tokens, frames, form of the mask) of each call of the cross-attention."""
    if frames.padded is not None:
        mask = frames.padded.mask
        return [(*frames.padded.shape, None if mask is None else mask.shape[1] > 1)]
    return [
        (1, b.size, b.last - b.first, None if b.mask is None else len(b.mask) > 1)
        for b in frames.blocks
    ]


def text_shapes(text: PackedText) -> list[tuple]:
    return [group.shape for group in text.groups]


def met(sample, count: int, rounded: bool) -> dict[str, float]:
    """Shapes that MICROBATCHES of `count` samples have, those that are new in the last third, and
    the share of (query, key) pairs that are computed on top of those of exact lengths.
    """
    rng = random.Random(1)
    cross: list[set] = []
    text: list[set] = []
    pairs = 0
    for _ in range(MICROBATCHES):
        samples = [sample(rng) for _ in range(count)]
        lengths = [length for length, _ in samples]
        total = -(-sum(lengths) // 64) * 64
        rows = torch.tensor([row for row, (_, at) in enumerate(samples) for _ in at])
        places = torch.tensor([place for _, at in samples for place in at])
        frames = plan_frames(rows, places, lengths, total, rounded=rounded)
        cross.append(set(cross_shapes(frames)))
        packed = PackedText(torch.zeros(total, dtype=torch.long), lengths, rounded)
        text.append(set(text_shapes(packed)))
        pairs += frames.pairs
    out: dict[str, float] = {"pairs": pairs}
    for name, seen in (("cross", cross), ("text", text)):
        early = set().union(*seen[: 2 * MICROBATCHES // 3])
        out[name] = len(early.union(*seen))
        out[f"late {name}"] = len(set().union(*seen) - early)
    return out


# Shapes of the cross-attention and of text's attention, those of both that are new after two thirds
# of the microbatches, and pairs of the cross-attention over those of exact lengths (docs/gpu.md has
# them of 300 microbatches). Of exact lengths there are 600 to 1,000 shapes, 190 to 230 of them new.
BOUNDS = {
    "image, 8 a microbatch": (image, 8, (16, 45, 5, 1.3)),
    "realtime": (realtime, 1, (40, 12, 5, 1.3)),
    "image and video, 4 a microbatch": (any_kind, 4, (90, 36, 15, 1.5)),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_microbatches_soon_have_no_new_shapes(name):
    sample, count, (cross, text, late, waste) = BOUNDS[name]
    exact, rounded = (met(sample, count, on) for on in (False, True))
    assert rounded["cross"] <= cross
    assert rounded["text"] <= text
    assert rounded["late cross"] + rounded["late text"] <= late
    assert exact["late cross"] + exact["late text"] >= 100
    assert rounded["pairs"] <= waste * exact["pairs"]
