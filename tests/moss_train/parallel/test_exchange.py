"""The encoder's gradients, summed over many chunks of frames."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moss_train.config import Config
from moss_train.model.choose_kernels import choose_kernels
from moss_train.model.moss_video import MossVideo
from moss_train.parallel.distribute import StepBatch, TextBatch, _rows
from moss_train.parallel.exchange import FrameExchange
from moss_train.train.optimizer import make_train_state
from moss_train.train.param_groups import freeze
from tests.kept import Kept
from tests.moss_train.model.build import preset, random_model

FRAMES = 256


def built(
    groups, dtype: str, chunk: int, recompute: bool = True, kept: int = 0, fp8: str = "none"
) -> MossVideo:
    """Weights of both types are equal: those that bf16 has."""
    tiny = preset("tiny", dtype=dtype, fp8=fp8)
    tiny.vision = replace(
        tiny.vision, frames_per_chunk=chunk, recompute=recompute, kept_frames=kept
    )
    model = random_model(tiny, groups, choose_kernels(tiny))
    for parameter in model.encoder.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    return model


def exchange_of(model: MossVideo) -> FrameExchange:
    chunk = model.config.vision.frames_per_chunk
    assert chunk is not None
    return FrameExchange(model.config, model.encoder, model.groups, chunk)


def batch(frames: int) -> StepBatch:
    """One microbatch of frames that are all different."""
    none = torch.zeros(0, dtype=torch.int64)
    ratio_ids = torch.ones(frames, dtype=torch.int64)
    text = TextBatch(none, none, [], none, none, ratio_ids)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 255, (frames, 1, 3, 56, 56), generator=generator)
    return StepBatch([text], pixels.to(torch.uint8), ratio_ids, [frames])


def returned(states: Tensor) -> Tensor:
    """A gradient for the states, with a mean: its sums grow with the number of frames."""
    generator = torch.Generator().manual_seed(6)
    return (0.3 + torch.rand(states.shape, generator=generator)).bfloat16().to(states.dtype)


def passed(groups, *of_model, **fields) -> tuple[Tensor, dict[str, Tensor]]:
    """The states, and the main gradients of the encoder (`built`)."""
    model = built(groups, *of_model, **fields)
    config = Config(model=model.config)
    config.trainer.steps = 2
    state = make_train_state(model, config, freeze(model, ["vision.*", "projector.*"]))
    state.zero_gradients()
    exchange = exchange_of(model)
    (states,) = exchange.encode(batch(FRAMES))
    states.grad = returned(states)
    exchange.return_gradient()
    main = {name: p.main_grad.clone() for name, p in model.encoder.named_parameters()}
    return states.detach(), main


def gradients(groups, dtype: str, chunk: int, recompute: bool = True) -> dict[str, Tensor]:
    return passed(groups, dtype, chunk, recompute)[1]


def in_one_pass(groups) -> dict[str, Tensor]:
    """bf16, a frame a chunk, all chunks in one backward pass of autograd."""
    model = built(groups, "bf16", 1)
    exchange = exchange_of(model)
    all_frames = batch(FRAMES)
    parts = zip(all_frames.frames.split(1), all_frames.ratio_ids.split(1), strict=True)
    states = torch.cat([exchange._encode(*part) for part in parts])
    states.backward(returned(states))
    return {name: p.grad.float() for name, p in model.encoder.named_parameters()}


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, of each parameter that has a gradient."""
    return {
        name: float((ours[name] - expected).norm() / expected.norm())
        for name, expected in exact.items()
        if expected.any()
    }


@pytest.fixture(scope="module")
def exact(groups) -> dict[str, Tensor]:
    return gradients(groups, "fp32", chunk=FRAMES, recompute=False)


@pytest.fixture(scope="module")
def of_chunk(groups) -> int:
    """Bytes that three frames keep."""
    model = built(groups, "fp32", chunk=3, recompute=False)
    graphs = Kept(model.encoder.parameters())
    exchange = exchange_of(model)
    with graphs:
        exchange.encode(batch(3))
        return graphs.now


def test_gradients_of_many_chunks_are_added_in_fp32(groups, exact) -> None:
    """What remains is the rounding of activations, whatever the number of chunks."""
    many = errors(gradients(groups, "bf16", chunk=1), exact)
    assert max(many.values()) < 0.01
    # What it is for: autograd adds in bf16.
    assert max(errors(in_one_pass(groups), exact).values()) > 0.05


@pytest.mark.parametrize(("chunk", "recompute"), [(7, True), (64, False)])
def test_chunks_change_no_gradient(groups, exact, chunk, recompute) -> None:
    ours = errors(gradients(groups, "fp32", chunk, recompute), exact)
    assert max(ours.values()) < 1e-5


@pytest.mark.parametrize("fp8", ["none", "tower"])
def test_kept_frames_change_no_number(groups, fp8: str) -> None:
    """Whether all, some or none are kept, to the bit: sums have the same order."""
    states, none = passed(groups, "bf16", 24, fp8=fp8)
    for kept in (24, 100, FRAMES):
        own, ours = passed(groups, "bf16", 24, kept=kept, fp8=fp8)
        assert torch.equal(own, states)
        assert all(torch.equal(ours[name], expected) for name, expected in none.items())


@pytest.mark.parametrize(
    ("frames", "most", "kept"), [(24, 0, 0), (24, 2, 0), (24, 8, 6), (24, 24, 24), (8, 20, 8)]
)
def test_as_many_whole_chunks_are_kept_as_are_asked_for(
    groups, of_chunk, frames, most, kept
) -> None:
    """They are encoded once, and what they keep is there before the backward pass, which frees it
    before it needs memory for others."""
    model = built(groups, "fp32", chunk=3, kept=most)
    exchange = exchange_of(model)
    encoded: list[int] = []
    model.encoder.vision.register_forward_pre_hook(lambda _, given: encoded.append(len(given[0])))
    graphs = Kept(model.encoder.parameters())
    with graphs:
        (states,) = exchange.encode(batch(frames))
        assert exchange.kept_frames == kept
        waiting = graphs.now
        states.grad = returned(states)
        exchange.return_gradient()
    assert sum(encoded) == 2 * frames - kept
    assert waiting == pytest.approx(kept / 3 * of_chunk, rel=0.01)
    assert graphs.peak == pytest.approx(max(kept / 3, 1) * of_chunk, rel=0.01)
    assert graphs.now == 0


def test_nothing_is_kept_without_a_backward_pass_or_of_a_frozen_tower(groups) -> None:
    model = built(groups, "fp32", chunk=3, kept=24)
    exchange = exchange_of(model)
    with torch.no_grad():
        (states,) = exchange.encode(batch(24))
    assert (exchange.kept_frames, states.requires_grad) == (0, False)
    freeze(model, ["projector.*"])
    exchange = exchange_of(model)
    exchange.encode(batch(24))
    assert exchange.kept_frames == 0


def test_shares_are_sent_without_copies() -> None:
    """But of the last one, where it is shorter: of 7 frames, 3, 2 and 2."""
    frames = torch.arange(7.0)[:, None]
    shares = [_rows(frames, start, 3) for start in (0, 3, 5)]
    assert [share[:, 0].tolist() for share in shares] == [[0, 1, 2], [3, 4, 5], [5, 6, 0]]
    own = {frames.untyped_storage().data_ptr()}
    assert {share.untyped_storage().data_ptr() for share in shares[:2]} == own


def test_one_chunk_is_kept_at_a_time(groups) -> None:
    peaks = {}
    for frames in (3, 24):
        model = built(groups, "fp32", chunk=3)
        exchange = exchange_of(model)
        kept = Kept(model.encoder.parameters())
        with kept:
            (states,) = exchange.encode(batch(frames))
            assert kept.peak == 0
            states.grad = returned(states)
            exchange.return_gradient()
        assert kept.now == 0
        peaks[frames] = kept.peak
    assert 0 < peaks[24] < 1.01 * peaks[3]
