"""Keys and values in 8 bits: half the memory, logits that move little, all else as it was."""

from __future__ import annotations

import pytest
import torch

from inference.engine.engine import Engine
from inference.engine.fork import fork
from inference.engine.kv_scales import HEADROOM
from inference.engine.load import load_engine
from inference.engine.quantize import quantize_decoder
from inference.engine.slots import Step
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels.choose import Kernels
from tests.inference.engine.streams import IMAGE, AnyRows, Player, make_stream, offline, play
from tests.inference.tiny import tiny_model

LARGEST = 448.0  # of e4m3 (OCP 8-bit floating point, 2023)


@pytest.fixture(scope="module")
def model() -> MossVideoForConditionalGeneration:
    return tiny_model()


def eight_bit(model: MossVideoForConditionalGeneration, fixed: bool, **options) -> Engine:
    engine = Engine(model, max_tokens=128, window=3, kv_dtype="fp8", **options)
    if fixed:
        kernels = Kernels(attention=AnyRows)
        engine.graph_runner = engine.make_graph_runner(kernels, graphs=False, compile=False)
    return engine


def played(engine: Engine, frames: int = 9) -> Player:
    """A stream whose ring wraps."""
    player = Player(engine, make_stream(1, frames=frames))
    play(engine, [player])
    return player


def test_logits_move_little_and_alike_in_every_form_of_a_pass(model) -> None:
    packed, fixed = (played(eight_bit(model, form)) for form in (False, True))
    positions = packed.stream.image_positions

    def sees(t: int, f: int) -> bool:
        arrived = sum(p <= t for p in positions)
        return arrived - 3 <= f < arrived

    exact = offline(model, packed.stream, sees)
    got = torch.stack(list(packed.logits.values()))
    wanted = torch.stack([exact[i] for i in packed.logits])
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.1
    torch.testing.assert_close(got, torch.stack(list(fixed.logits.values())), atol=1e-3, rtol=0)


def test_a_session_takes_half_the_memory_and_admission_knows(model) -> None:
    whole, half = Engine(model, window=3).cache, eight_bit(model, False).cache
    per_token = {cache: cache.sizes.text / cache.sizes.text_length for cache in (whole, half)}
    assert (per_token[whole], per_token[half]) == (4 * per_token[half], per_token[half])  # fp32
    for cache in (whole, half):
        assert cache.text.nbytes == cache.sizes.text
        assert cache.frames.nbytes == cache.sizes.frames


def test_a_session_that_is_saved_or_forked_goes_on_as_it_was(model) -> None:
    engine = eight_bit(model, False, max_sessions=3)
    slot = engine.open()
    features = engine.encode(list(make_stream(2).pixels[:2]))
    engine.step([Step(slot, [5, IMAGE, 6, IMAGE, 7], features)])
    state = engine.save(slot)
    assert state["text"].dtype == torch.float32  # which an engine of any kv_dtype takes
    slots = [slot, engine.restore(state)]
    for one in slots:
        one.pending = None
    slots.append(fork(engine, slot, slot.sampling))
    for _ in range(5):
        tokens = engine.step([Step(one, [8] if one.pending is None else []) for one in slots])
        assert len(set(tokens)) == 1
    for buffer in (engine.cache.text, engine.cache.frames):
        numbers = buffer.float()
        assert torch.equal(numbers[:, :, 0], numbers[:, :, 1])


def test_no_text_is_cut_off_however_its_input_looks(model) -> None:
    """Inputs that make each row's largest key and value: what e4m3 holds is not exceeded, and the
    largest of all is within a factor of two of it, or four where a rotation could add to it."""
    decoder, cache = model.model.language_model, eight_bit(model, False).cache
    for index in cache.own:
        layer, scales = decoder.layers[index], cache.scales_of[index]
        assert torch.equal(scales.log2(), scales.log2().round())
        for number, linear in enumerate((layer.self_attn.k_proj, layer.self_attn.v_proj)):
            rows = linear.weight * layer.input_layernorm.weight
            worst = layer.input_layernorm(rows)  # [rows, H]: an input that points along each row
            made = (worst @ linear.weight.T).abs().unflatten(1, (len(scales[0]), -1))
            largest = made.amax((0, 2)) / scales[number]  # of each head
            assert (largest <= LARGEST).all()
            assert (largest > LARGEST / (4, 2)[number]).all()


def test_frames_like_noise_keep_their_headroom(model) -> None:
    cache = played(eight_bit(model, False)).engine.cache
    values = cache.frames[:, 1].float().abs().amax()
    assert LARGEST / HEADROOM / 8 < values <= LARGEST


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_weights_have_the_scales_of_what_they_stand_for(kind: str) -> None:
    model = tiny_model()
    whole = eight_bit(model, False).cache.scales_of
    quantize_decoder(model, kind)
    quantized = eight_bit(model, False).cache.scales_of
    for layer, scales in whole.items():
        assert (quantized[layer].log2() - scales.log2()).abs().max() <= 1


def test_what_cannot_be_had_is_refused(tiny, monkeypatch) -> None:
    with pytest.raises(ValueError, match="kv_dtype=int4: choose one of auto, fp8"):
        Engine(tiny_model(), kv_dtype="int4")
    monkeypatch.setattr("data_pipeline.devices.EIGHT_BIT", ("cuda",))
    refusal = "kv_dtype=fp8: keys and values in 8 bits run on cuda, not on cpu: leave it out"
    with pytest.raises(ValueError, match=refusal):
        load_engine(tiny, device="cpu", kv_dtype="fp8")
