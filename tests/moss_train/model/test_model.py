"""What the whole model promises: causality, blind rows, recomputation, gradients, switches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moss_train import hardware
from moss_train.config import AdapterConfig, ParallelConfig
from moss_train.convert.random_init import random_reader
from moss_train.convert.weights import fill
from moss_train.model.frame_plan import NEVER, FramePlan, plan_frames
from moss_train.model.lora import is_adapter
from moss_train.model.loss import LossOptions, find_targets
from moss_train.model.moss_video import MossVideo
from moss_train.model.packed_text import PackedText
from moss_train.model_config import ModelConfig
from tests.moss_train.model.build import preset, random_model

LENGTH = 24
IMAGE_AT = torch.tensor([5, 9, 10, 17])
TINY = preset("tiny")


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """One row of tokens and its frames' pixels."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(20, 320, (1, LENGTH), generator=generator)
    tokens[0, IMAGE_AT] = 320
    return tokens, torch.randn(len(IMAGE_AT), 1, 3, 56, 56, generator=generator)


def see(model: MossVideo, pixels: Tensor, **plan) -> FramePlan:
    """The frames of the row, encoded."""
    rows = torch.zeros(len(IMAGE_AT), dtype=torch.long)
    attend_all = model.config.tokens_before_first_frame == "attend_all"
    frames = plan_frames(rows, IMAGE_AT, [LENGTH], LENGTH, attend_all=attend_all, **plan)
    frames.states = model.encoder(pixels, torch.ones(len(IMAGE_AT), dtype=torch.long))
    return frames


def no_frames() -> FramePlan:
    """The plan of a text-only row."""
    return plan_frames(torch.zeros(0).long(), torch.zeros(0).long(), [LENGTH], LENGTH)


def predict(model: MossVideo, tokens: Tensor, frames: FramePlan) -> Tensor:
    """Logits `[S, V]`."""
    with torch.no_grad():
        return model.chunks[0](PackedText(tokens[0], [LENGTH]), frames)


@pytest.fixture(scope="module")
def model(groups):
    return random_model(TINY, groups)


def test_tokens_before_the_first_frame_are_as_if_there_were_none(model):
    tokens, pixels = batch()
    seeing, blind = (predict(model, tokens, f) for f in (see(model, pixels), no_frames()))
    assert torch.equal(seeing[: IMAGE_AT[0]], blind[: IMAGE_AT[0]])
    assert not torch.isclose(seeing[IMAGE_AT[0] :], blind[IMAGE_AT[0] :]).all(-1).any()


def test_attend_all_lets_blind_tokens_see_the_future(groups):
    model = random_model(replace(TINY, tokens_before_first_frame="attend_all"), groups)
    tokens, pixels = batch()
    seeing, blind = (predict(model, tokens, f) for f in (see(model, pixels), no_frames()))
    assert not torch.isclose(seeing, blind).all(-1).any()


@pytest.mark.parametrize("frame", range(len(IMAGE_AT)))
def test_a_frame_changes_nothing_before_its_mark(model, frame):
    tokens, pixels = batch()
    before = predict(model, tokens, see(model, pixels))
    pixels[frame] += 1
    after = predict(model, tokens, see(model, pixels))
    position = IMAGE_AT[frame]
    assert torch.equal(before[:position], after[:position])
    assert not torch.isclose(before[position], after[position]).all()


@pytest.mark.parametrize("position", [0, 7, LENGTH - 1])
def test_a_token_changes_nothing_before_itself(model, position):
    tokens, pixels = batch()
    before = predict(model, tokens, see(model, pixels))
    tokens[0, position] = 19
    after = predict(model, tokens, see(model, pixels))
    assert torch.equal(before[:position], after[:position])
    assert not torch.isclose(before[position:], after[position:]).all(-1).any()


def test_packed_neighbours_see_nothing_of_each_other(model):
    (first, pixels), (second, others) = batch(0), batch(1)
    lengths = [LENGTH, LENGTH - 5]
    text = PackedText(torch.cat((first[0], second[0, :-5], torch.zeros(3).long())), lengths)
    frames = plan_frames(
        torch.arange(2).repeat_interleave(len(IMAGE_AT)),
        IMAGE_AT.repeat(2),
        lengths,
        sum(lengths) + 3,
    )
    frames.states = model.encoder(torch.cat((pixels, others)), torch.ones(2 * len(IMAGE_AT)).long())
    with torch.no_grad():
        packed = model.chunks[0](text, frames)[: sum(lengths)].split(lengths)
    alone = [
        predict(model, tokens, see(model, p)) for tokens, p in ((first, pixels), (second, others))
    ]
    torch.testing.assert_close(packed[0], alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[1], alone[1][:-5], rtol=0, atol=1e-5)


def test_frames_that_no_token_sees_change_nothing(model):
    tokens, pixels = batch()
    hidden = see(model, pixels, visible_from=torch.full_like(IMAGE_AT, NEVER))
    unseen, blind = (predict(model, tokens, f) for f in (hidden, no_frames()))
    assert torch.equal(unseen, blind)


def test_positions_turn_the_cross_attention_only_where_the_model_has_them(groups):
    tokens, pixels = batch()
    for rotates in (True, False):
        model = random_model(replace(TINY, cross_attention_rope=rotates), groups)
        frames = see(model, pixels)
        before = predict(model, tokens, frames)
        frames.positions = frames.positions + 3
        assert torch.equal(before, predict(model, tokens, frames)) is not rotates


def loss_gradients(model: MossVideo, frames: FramePlan) -> dict[str, Tensor | None]:
    """Gradients of the loss over all tokens of the row."""
    tokens, _ = batch()
    text = PackedText(tokens[0], [LENGTH])
    targets = find_targets(
        tokens[0].masked_fill(tokens[0] == 320, -100), [LENGTH], LossOptions(11, 0.1)
    )
    for _, parameter in model.named_parameters():
        parameter.grad = None
    model.chunks[0](text, frames, targets, torch.tensor(float(targets.count))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_recomputation_changes_no_gradient(groups):
    _, pixels = batch()
    models = {
        kind: random_model(TINY, groups, recompute=kind) for kind in ("none", "selective", "full")
    }
    plain, *others = (loss_gradients(m, see(m, pixels)) for m in models.values())
    for recomputed in others:
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_flex_gives_the_logits_of_sdpa(model, groups):
    tokens, pixels = batch()
    flex = random_model(replace(TINY, attention="flex"), groups)
    got = predict(flex, tokens, see(flex, pixels))
    torch.testing.assert_close(got, predict(model, tokens, see(model, pixels)), rtol=0, atol=1e-4)


def test_a_text_only_batch_gives_every_decoder_parameter_a_gradient(model):
    gradients = loss_gradients(model, no_frames())
    decoder = {name: g for name, g in gradients.items() if name.startswith("decoder.")}
    assert [name for name, gradient in decoder.items() if gradient is None] == []
    cross = [g for name, g in decoder.items() if ".linear_kv." in name or ".attn_gate" in name]
    assert len(cross) == 4
    assert not any(gradient.any() for gradient in cross if gradient is not None)


def test_toy_starts_with_gradients_behind_its_gates(groups):
    config = preset("toy")
    model = MossVideo(config, ParallelConfig(), groups)
    fill(model, random_reader(config, seed=1))
    frames = see(model, batch()[1])
    gradients = loss_gradients(model, frames)
    dead = {name for name, g in gradients.items() if g is None or not g.any()}
    # Closed gates of the tower (as Llama-3.2-Vision starts) learn first, then what is behind them.
    assert dead == {
        "vision.pre_tile.embedding.weight",
        "vision.post_tile.embedding.weight",
        "vision.position.tile_embedding.weight",
    }


@pytest.mark.parametrize(("backend", "package"), [("flash", "flash-attn"), ("te", "Transformer")])
def test_a_missing_attention_package_is_named(backend, package, groups):
    module = {"flash": "flash_attn", "te": "transformer_engine"}[backend]
    try:
        __import__(module)
    except ImportError:
        with pytest.raises(ValueError, match=f"model.attention={backend} needs .*{package}"):
            MossVideo(replace(TINY, attention=backend), ParallelConfig(), groups)
    else:
        pytest.skip(f"{module} is installed")


@pytest.fixture
def count_on_meta(groups, monkeypatch):
    """Counts the parameters of a model of a process on the device "meta": nothing is allocated."""
    monkeypatch.setattr(hardware, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))  # for megatron

    def count(config: ModelConfig) -> int:
        built = MossVideo(config, ParallelConfig(), groups, AdapterConfig(name="lora", rank=2))
        made: list[Tensor] = [p for _, p in built.named_parameters()]
        made += built.encoder.buffers()
        made += [buffer for chunk in built.chunks for buffer in chunk.buffers()]
        assert {tensor.device.type for tensor in made} == {"meta"}
        return sum(p.numel() for name, p in built.named_parameters() if not is_adapter(name))

    return count


def transformers_count(**changes: Any) -> int:
    """Parameters of transformers' model with these changes of its default configuration."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    with torch.device("meta"):
        built = MllamaForConditionalGeneration(MllamaConfig(**changes))
    return sum(parameter.numel() for parameter in built.parameters())


def test_11b_has_the_parameters_of_transformers_mllama(count_on_meta):
    config = preset("11b")
    at_560 = transformers_count(vision_config={"image_size": 560})
    assert count_on_meta(config) == at_560 == 10_670_220_835
    # transformers' default has tiles of 448 pixels, with smaller tables of patch positions.
    base = replace(config, vision=replace(config.vision, image_size=448))
    assert count_on_meta(base) == transformers_count() == 10_642_941_475


def test_90b_has_the_parameters_of_transformers_mllama(count_on_meta):
    sizes = {
        "hidden_size": 8192,
        "num_hidden_layers": 100,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
        "cross_attention_layers": list(range(3, 100, 5)),
    }
    expected = transformers_count(vision_config={"image_size": 560}, text_config=sizes)
    assert count_on_meta(preset("90b")) == expected == 88_593_355_323
