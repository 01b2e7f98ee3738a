"""The floor counts what a model's configuration says, and turns it into seconds."""

from __future__ import annotations

import pytest
import torch

from inference.bench.floor import Floor, Machine, Work, encoding_flop
from inference.bench.models import TEXT_SMALL, VISION_SMALL, random_model
from inference.engine.engine import Engine
from inference.engine.quantize import quantize_decoder

H, INNER, WORDS, HEADS, KV = 128, 256, 2000, 4, 1
PATCHES = 5  # vision tokens of a frame: 2 x 2 pooled patches and the class token


@pytest.fixture(scope="module")
def work() -> Work:
    assert (TEXT_SMALL["hidden_size"], VISION_SMALL["image_size"]) == (H, 56)
    model = random_model("small", torch.device("cpu"), torch.float32)
    return Work.of(model, Engine(model, window=8, max_tokens=64), encoding_flop(model))


def test_weights_that_a_token_needs(work: Work) -> None:
    width = H // HEADS
    mlp = 3 * H * INNER
    own = 2 * H * H + 2 * H * KV * width + mlp  # q, o, k, v of four layers
    cross = 2 * H * H + mlp  # q and o: keys and values are those of frames
    products = 4 * own + cross + H * WORDS
    norms = 5 * 2 * H + H  # of the layers and the last one
    small = 2 * width + 2  # norms of q and k, gates
    assert work.flop == 2 * products
    assert work.weights == 4 * (products + norms + small)
    assert work.text == 4 * 2 * KV * width * 4
    assert work.frame == 1 * 2 * KV * width * 4 * PATCHES


def test_weights_in_4_bits_are_half_a_byte_and_two_bytes_a_group(work: Work) -> None:
    model = random_model("small", torch.device("cpu"), torch.bfloat16)
    quantize_decoder(model, "int4")
    four = Work.of(model, Engine(model, window=8, max_tokens=64), encode=0)
    assert four.flop == work.flop
    head = H * WORDS
    layers = work.flop // 2 - head
    small = work.weights - 4 * (layers + head)  # norms and gates, which stay as they are
    # Groups of 128 inputs: all inputs are 128 or 256. The head is in 8 bits.
    assert four.weights == layers // 2 + 2 * layers // 128 + head + 2 * WORDS + small // 2


def test_a_frame_of_the_tower(work: Work) -> None:
    tokens, padded, d, inner = 17, 24, 32, 64  # 4 x 4 patches and the class token; to whole eights
    patches = 2 * 16 * 3 * 14 * 14 * d
    linear = 2 * padded * (4 * d * d + 2 * d * inner)
    attention = 4 * padded * padded * d
    projector = 2 * PATCHES * 64 * H
    keys = 2 * PATCHES * 2 * H * (H // HEADS)
    least = patches + 3 * 2 * tokens * (4 * d * d + 2 * d * inner) + projector + keys
    most = patches + 3 * (linear + attention) + projector + keys
    assert least <= work.frame_flop <= most


def test_seconds() -> None:
    work = Work(weights=1000, flop=20, frame_weights=500, frame_flop=900, text=1, frame=10)
    floor = Floor(Machine(bytes_per_s=1000, flop_per_s=100), work, text=100, frames=40)
    assert floor.step() == pytest.approx((1000 + 100 + 400) / 1000)  # memory
    assert floor.step(sessions=16) == pytest.approx((1000 + 16 * 500) / 1000)
    assert floor.step(tokens=20) == pytest.approx(20 * 20 / 100)  # products
    assert floor.vision(2) == pytest.approx(2 * 900 / 100)
    assert floor.decision() == pytest.approx(9 + 1.5)
    assert floor.first_token(4, 12) == pytest.approx(36 + 3.2)
