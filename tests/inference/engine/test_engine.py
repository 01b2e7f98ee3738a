"""What streams through the engine equals one pass over the whole, whatever was forgotten."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from inference.engine.engine import Engine, EngineFull
from inference.engine.engine_config import EngineConfig
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Step
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.kernels import plain
from inference.kernels.choose import Kernels
from tests.inference.engine.streams import IMAGE, Player, largest_error, make_stream, offline, play
from tests.inference.tiny import tiny_model

SILENCE = 7


@pytest.fixture(scope="module")
def model() -> MossVideoForConditionalGeneration:
    return tiny_model(silence_token_id=SILENCE)


class AnyRows(plain.Attention):
    """Plain attention that takes a choice of slots, as the kernels do."""

    any_rows = True


FORMS = {"static": Kernels(), "rows": Kernels(attention=AnyRows)}


def engine_of(model: MossVideoForConditionalGeneration, form: str, **options) -> Engine:
    """`form`: "packed"; "static": one-token and frame steps in the shapes of a CUDA graph, without
    the graph, all slots in each; "rows": prompts too, and only the slots that have a step."""
    engine = Engine(model, max_tokens=options.pop("max_tokens", 128), **options)
    if form != "packed":
        engine.graph_runner = engine.make_graph_runner(FORMS[form], graphs=False, compile=False)
    return engine


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
def test_a_stream_equals_one_pass_over_the_whole(model, form: str) -> None:
    engine = engine_of(model, form, window=8)
    player = Player(engine, make_stream(1))
    play(engine, [player])
    assert len(player.logits) > 8
    wanted = offline(model, player.stream)
    assert wanted.std() > 0.5
    assert largest_error(player, wanted) < 1e-4
    assert player.slot.frames == player.stream.image_positions
    assert player.slot.evictions == []


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
@pytest.mark.parametrize("window", [3, 8])
def test_a_step_that_failed_can_be_tried_again(
    model, form: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step's first pass fails once in the last layer: frames have been put into the ring."""
    engine = engine_of(model, form, window=window, max_sessions=2)
    players = [Player(engine, make_stream(seed, frames=9)) for seed in (1, 2)]
    last = engine.model.model.language_model.layers[-1].mlp.down_proj
    step, fails, forward = engine.step, [False], last.forward

    def failing(*args, **kwargs):
        if fails[0]:
            raise RuntimeError("a pass failed")
        return forward(*args, **kwargs)

    def again(steps):
        fails[0] = True
        with pytest.raises(RuntimeError, match="a pass failed"):
            step(steps)
        fails[0] = False
        return step(steps)

    monkeypatch.setattr(last, "forward", failing)
    monkeypatch.setattr(engine, "step", again)
    play(engine, players)
    twins = [Player(engine_of(model, form, window=window), p.stream) for p in players]
    monkeypatch.setattr(last, "forward", forward)
    for player, twin in zip(players, twins, strict=True):
        play(twin.engine, [twin])
        assert player.logits.keys() == twin.logits.keys()
        assert all(torch.allclose(player.logits[t], twin.logits[t], atol=1e-5) for t in twin.logits)
        assert player.slot.evictions == twin.slot.evictions
        assert player.slot.tokens == twin.slot.tokens


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
@pytest.mark.parametrize("sinks", [0, 1])
def test_after_wrapping_only_the_kept_frames_are_seen(model, form: str, sinks: int) -> None:
    engine = engine_of(model, form, window=3, sinks=sinks)
    player = Player(engine, make_stream(2, frames=9))
    play(engine, [player])
    image_positions = player.stream.image_positions

    def sees(t: int, f: int) -> bool:
        arrived = sum(p <= t for p in image_positions)  # frames up to token t
        recent = arrived - (3 - sinks) <= f < arrived
        return recent or (f < min(sinks, arrived)) or (arrived <= 3 and f < arrived)

    assert largest_error(player, offline(model, player.stream, sees)) < 1e-4
    assert largest_error(player, offline(model, player.stream)) > 1e-2  # it does forget
    kept = [*image_positions[:sinks], *image_positions[-(3 - sinks) :]]
    assert player.slot.frames == kept
    gone = [p for eviction in player.slot.evictions for p in eviction.positions]
    assert gone == [p for p in image_positions if p not in kept]


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
def test_dropped_text_is_not_seen_and_the_rest_keeps_its_place(model, form: str) -> None:
    engine = engine_of(model, form, window=64, max_tokens=48)
    player = Player(engine, make_stream(3, frames=45, silence=SILENCE))
    forgotten: dict[int, int] = {}  # token -> first token that no longer sees it
    seen = 0
    while True:
        at = player.at
        before = len(player.logits)
        play(engine, [player], until=1)
        if len(player.logits) == before:
            break
        for eviction in player.slot.evictions[seen:]:
            assert eviction.kind == "text"
            forgotten |= dict.fromkeys(eviction.positions, at)
        seen = len(player.slot.evictions)
        assert player.slot.length <= 48
    assert len(forgotten) > 30
    tokens = player.stream.tokens
    pairs = sum(tokens[p] in (SILENCE, IMAGE) for p in forgotten)
    assert pairs == len(forgotten)  # words and the prompt are still there
    never = len(tokens)
    wanted = offline(model, player.stream, sees_token=lambda t, s: t < forgotten.get(s, never))
    assert largest_error(player, wanted) < 1e-4
    kept = [i for i in range(never) if i not in forgotten]
    assert player.slot.positions == kept
    assert player.slot.tokens == [tokens[i] for i in kept]


def test_when_pairs_are_gone_old_words_go_but_not_the_head_or_the_last_turns(model) -> None:
    engine = engine_of(model, "packed", max_tokens=16)
    engine.packed.special = engine.silence_token, engine.image_token, 300
    slot = engine.open()
    engine.step([Step(slot, [1, 2, 300, 20, 21, 22, 23, 24, 25, 26])])
    for _ in range(12):
        slot.pending = 30
        engine.step([Step(slot)])
    assert slot.tokens[:3] == [1, 2, 300]
    assert slot.positions[-12:] == list(range(10, 22))
    assert [e.kind for e in slot.evictions] == ["text"] * 6


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
def test_slots_side_by_side_stream_as_alone(model, form: str) -> None:
    engine = engine_of(model, form, window=3, max_sessions=3)
    streams = [make_stream(seed, frames=3 + 2 * seed) for seed in range(3)]
    together = [Player(engine, stream) for stream in streams]
    play(engine, together)
    for player in together:
        engine.close(player.slot)
    for player in together:
        alone = Player(engine, player.stream)
        play(engine, [alone])
        engine.close(alone.slot)
        assert player.logits.keys() == alone.logits.keys()
        for i, logits in alone.logits.items():
            torch.testing.assert_close(player.logits[i], logits, atol=1e-4, rtol=0)


def test_a_prompt_or_a_frame_leaves_the_other_slots_in_fixed_shapes(model, monkeypatch) -> None:
    found, passes = [], []
    for form in ("static", "rows", "packed"):
        engine = engine_of(model, form, window=4, max_sessions=4)
        frames = engine.encode([torch.full((3, 30, 40), 60 * i, dtype=torch.uint8) for i in (1, 2)])
        slots = [engine.open() for _ in range(4)]
        engine.step([Step(slot, [5, 6, 7 + i]) for i, slot in enumerate(slots)])
        runner = engine.graph_runner
        if runner is not None:
            run = runner.run

            def record(steps, run=run):
                passes.append(len(steps[0].tokens))
                return run(steps)

            monkeypatch.setattr(runner, "run", record)
        tokens = engine.step([
            Step(slots[0]), Step(slots[1], [IMAGE], frames[:1]), Step(slots[2], [8, 9, 10]),
            Step(slots[3], [IMAGE], frames[1:]),
        ])  # fmt: skip
        found.append([tokens, *(engine.step([Step(s) for s in slots]) for _ in range(6))])
    assert passes == [0, 1, *[0] * 6, 0, 1, 3, *[0] * 6]
    assert found[0] == found[1] == found[2]


def test_prompts_that_ask_for_no_token_and_prompts_that_are_too_long(model) -> None:
    found = []
    for form in ("packed", "rows"):
        engine = engine_of(model, form, max_tokens=256, max_sessions=3)
        slots = [engine.open() for _ in range(3)]
        long = [20 + n % 200 for n in range(130)]
        steps = [Step(slots[0], [5, 6, 7], sample=False), Step(slots[1], long), Step(slots[2], [9])]
        tokens = engine.step(steps)
        assert tokens[0] is None
        found.append([tokens, engine.step([Step(slots[0], [8]), Step(slots[1]), Step(slots[2])])])
    assert found[0] == found[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=2)])
def test_graphs_equal_eager(sampling: Sampling) -> None:
    model = tiny_model(silence_token_id=SILENCE).cuda()
    found = []
    for graphs, kernels in ((True, "auto"), (True, "torch"), (False, "torch")):
        engine = Engine(
            model, max_tokens=128, window=3, max_sessions=2, graphs=graphs, kernels=kernels
        )
        assert (engine.graph_runner is not None) is graphs
        player, tokens = Player(engine, make_stream(2, frames=9)), []
        while step := player.step():
            tokens += engine.step([step])
        slot = engine.open(sampling)
        tokens += engine.step([Step(slot, [5, 6, 7])])
        for _ in range(20):
            tokens += engine.step([Step(slot)])
        found.append(tokens)
    assert found[0] == found[1] == found[2]


def test_an_interruption_equals_its_transcript(model) -> None:
    """What was sampled and not yet cached stays in the context before the user's turn."""
    engine = engine_of(model, "packed", window=8)
    slot = engine.open()
    frames = list(make_stream(4).pixels)
    transcript = [9, 10, 11, IMAGE]
    [token] = engine.step([Step(slot, transcript, engine.encode(frames[:1]))])
    assert token is not None
    turn = [300, 301, 40, 41, 300]
    transcript += [token, *turn, IMAGE]
    [after] = engine.step([Step(slot, [*turn, IMAGE], engine.encode(frames[1:2]))])
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([transcript]),
            pixel_values=torch.stack(frames[:2])[None, :, None],
        ).logits[0, -1]
    assert after == logits.argmax()
    assert slot.tokens == transcript


def test_tokens_are_taken_in_without_sampling(model) -> None:
    engine = engine_of(model, "packed", window=8)
    stream = make_stream(5)
    slot = engine.open()
    features = engine.encode(list(stream.pixels))
    half = stream.image_positions[2]
    assert engine.step([Step(slot, stream.tokens[:half], features[:2], sample=False)]) == [None]
    [token] = engine.step([Step(slot, stream.tokens[half:], features[2:])])
    assert token == offline(model, stream)[-1].argmax()


def test_a_saved_session_goes_on_as_it_would_have(model) -> None:
    stream = make_stream(6, frames=8)
    engine = engine_of(model, "packed", window=3, max_sessions=2)
    whole = Player(engine, stream)
    play(engine, [whole])
    engine.close(whole.slot)

    part = Player(engine, stream)
    play(engine, [part], until=9)
    file = io.BytesIO()
    torch.save(engine.save(part.slot), file)
    file.seek(0)
    other = engine_of(model, "packed", window=3, max_sessions=2)
    other.open()  # so that it lands in another slot
    part.engine, part.slot = other, other.restore(torch.load(file))
    assert part.slot.evictions  # not yet read: they come along
    play(other, [part])
    assert part.logits.keys() == whole.logits.keys()
    for i, logits in whole.logits.items():
        torch.testing.assert_close(part.logits[i], logits, atol=1e-5, rtol=0)
    saved = engine.save(part.slot)
    with pytest.raises(ValueError, match="other window"):
        engine_of(model, "packed", window=4).restore(saved)
    other_models = {
        "KV heads": {"text": saved["text"][:, :, :1]},
        "head width": {"text": saved["text"][..., :-2]},
        "layers": {"frames": saved["frames"][:1]},
        "patches of a frame": {"frames": saved["frames"][..., :-1, :]},
    }
    for changed in other_models.values():
        with pytest.raises(ValueError, match="other model"):
            engine.restore(saved | changed)
    with pytest.raises(ValueError, match="other vocabulary"):
        engine.restore(saved | {"seen": saved["seen"][:-1]})


def test_a_slot_that_is_opened_again_sees_nothing_of_before(model) -> None:
    engine = engine_of(model, "rows", window=3)
    first = Player(engine, make_stream(7, frames=6))
    play(engine, [first])
    with pytest.raises(EngineFull, match="all 1 sessions"):
        engine.open()
    engine.close(first.slot)
    second = Player(engine, make_stream(8, frames=3))
    play(engine, [second])
    assert largest_error(second, offline(model, second.stream)) < 1e-4


@pytest.mark.parametrize("form", ["packed", "static", "rows"])
def test_sampling_can_change_on_the_way(model, form: str) -> None:
    engine = engine_of(model, form)
    slot = engine.open()
    [token] = engine.step([Step(slot, [5, 6, 7])])
    assert token != SILENCE
    engine.set_sampling(slot, Sampling(silence_bias=1000.0))
    assert engine.step([Step(slot)]) == [SILENCE]
    engine.set_sampling(slot, Sampling(repetition_penalty=1e6, silence_bias=-1000.0))
    said = {*slot.tokens, token}
    for _ in range(5):  # what was said before the penalty came counts too
        [token] = engine.step([Step(slot)])
        assert token not in said
        said.add(token)


@pytest.mark.parametrize("name", ["image", "video", "realtime"])
def test_streams_the_published_greedy_tokens(name: str, shared: Path) -> None:
    case = load_file(shared / "golden" / f"{name}.safetensors")
    config = EngineConfig(max_tokens=64, tokens_before_first_frame="attend_all")
    engine = load_engine(shared / "golden", config, device="cpu")
    length = int(case["attention_mask"][0].sum())
    features = engine.encode(list(case["pixel_values"][0, :, 0]))
    slot = engine.open()
    tokens = engine.step([Step(slot, case["input_ids"][0, :length].tolist(), features)])
    while len(tokens) < len(case["greedy"]):
        tokens += engine.step([Step(slot)])
    assert tokens == case["greedy"].tolist()


def test_an_export_is_loaded_with_its_processor(tiny: Path) -> None:
    engine = load_engine(tiny, device="cpu", dtype="bf16")
    assert engine.dtype is torch.bfloat16
    assert engine.tokenizer.convert_ids_to_tokens(engine.end_of_turn) == "<|eot_id|>"
    [feature] = engine.encode([torch.zeros(3, 30, 40, dtype=torch.uint8)])
    assert feature.shape == (5, 64)
    slot = engine.open(Sampling(temperature=0.8, seed=3))
    tokens = engine.step([Step(slot, [1, IMAGE], [feature])])
    assert tokens[0] is not None


def test_an_impossible_step_is_refused_before_anything_changes(model) -> None:
    engine = engine_of(model, "packed", max_tokens=16)
    slot, frame = engine.open(), torch.zeros(5, 64)
    for step, message in (
        (Step(slot), "has no pending token"),
        (Step(slot, [1, IMAGE]), "1 <.image.> tokens, but 0 frames"),
        (Step(slot, [1], [frame]), "0 <.image.> tokens, but 1 frames"),
        (Step(slot, [IMAGE], [frame[:4]]), r"a frame of \(4, 64\), expected \(5, 64\)"),
        (Step(slot, [520]), "tokens must be from 0 to 519"),
        (Step(slot, [1] * 17), "a step of 17 tokens does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.step([step])
    with pytest.raises(ValueError, match="two steps at once"):
        engine.step([Step(slot, [1]), Step(slot, [2])])
    assert slot.length == 0
    engine.close(slot)
    engine.close(slot)
    with pytest.raises(ValueError, match="slot 0 is closed"):
        engine.step([Step(slot, [1])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": 4, "sinks": 4}, "sinks=4: must be less"),
        (
            {"tokens_before_first_frame": "none"},
            "tokens_before_first_frame=none: choose one of zero, attend_all",
        ),
    ],
)
def test_wrong_options_are_named(model, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model, **options)
