"""Several answers to one question: what it costs, against answers that are asked for one by one;
and the thread that computes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline import devices
from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.engine.sampling import Sampling
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration
from inference.session.answer import check_fits
from inference.session.handle import SessionHandle
from inference.session.runner import Runner
from tests.inference.tiny import SIZE, save_tiny
from tests.waiting import PATIENCE

FRAMES = 10
DRAWN = torch.Generator().manual_seed(1)
IMAGES = list(
    torch.randint(0, 256, (FRAMES, 3, SIZE, SIZE), dtype=torch.uint8, generator=DRAWN).unbind()
)
COUNT = 3


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return load_engine(tiny, device="cpu", window=16, max_tokens=1024, max_sessions=COUNT)


def question(runner: Runner) -> list[int]:
    """More frames and more tokens than one step takes."""
    special, vocabulary = runner.vocabulary.special, runner.vocabulary
    turn = vocabulary.user_turn("What is it? " * 20)
    assert len(turn) > 128
    return [special.begin_of_text, *[special.image] * FRAMES, *turn]


def said(handle: SessionHandle) -> tuple[str, str, list[Any]]:
    """Text, reason of the end, and the log-probabilities of each token."""
    events = list(handle.events())
    (done,) = (event.data for event in events if event.type == "response.done")
    return done["text"], done["reason"], [x for e in events for x in e.data.get("logprobs", ())]


def same(one: tuple[str, str, list[Any]], other: tuple[str, str, list[Any]]) -> None:
    assert one[:2] == other[:2]
    assert [token for token, *_ in one[2]] == [token for token, *_ in other[2]]
    own = [[value for _, value, _ in entries] for entries in (one[2], other[2])]
    assert own[0] == pytest.approx(own[1], abs=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_a_question_is_computed_once_for_all_answers(
    engine: Engine, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one's reader goes while the question is taken in: then by each."""
    samplings = [Sampling(temperature=1.3, seed=seed, repetition_penalty=penalty)
                 for seed in range(COUNT)]  # fmt: skip
    options: dict[str, Any] = {"max_new_tokens": 8, "likely": 2, "ignore_end": True}
    step, tokens, frames = engine.step, list[int](), list[int]()
    after = threading.Event()

    def counted(steps: Any) -> Any:
        tokens.append(sum(len(one.tokens) for one in steps))
        frames.append(sum(len(one.frames) for one in steps))
        result = step(steps)
        after.wait(PATIENCE)
        return result

    with Runner(engine) as runner:
        asked = question(runner)
        alone = [said(runner.answer(asked, IMAGES, sampling=s, **options)) for s in samplings]
        assert len({text for text, *_ in alone}) == COUNT
        monkeypatch.setattr(engine, "step", counted)
        after.set()
        together = runner.answers(asked, IMAGES, samplings, **options)
        for one, other in zip(alone, map(said, together), strict=True):
            same(one, other)
        assert (sum(tokens), sum(frames)) == (len(asked) - 1 + COUNT, FRAMES)
        after.clear()
        first, *others = runner.answers(asked, IMAGES, samplings, **options)
        first.close("its reader has gone")  # in the first step, which waits for it
        after.set()
        for one, other in zip(alone[1:], map(said, others), strict=True):
            same(one, other)
    assert not engine.slots


def test_its_thread_uses_the_device_of_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA gives each new thread the first of several GPUs."""
    used: list[tuple[torch.device, str]] = []
    monkeypatch.setattr(
        devices, "use", lambda device: used.append((device, threading.current_thread().name))
    )
    with Runner(engine):
        pass
    assert used == [(engine.device, "moss-engine")]


def test_a_question_that_does_not_fit_is_refused_whole(engine: Engine) -> None:
    """Else the model would answer about its end, and nobody would know."""
    with pytest.raises(ValueError, match=r"17 pictures and frames, .* window=16 at once"):
        check_fits(engine, [20], IMAGES[:1] * 17)
    with pytest.raises(ValueError, match="1024 tokens, and with an answer max_tokens=1024"):
        check_fits(engine, [20] * 1024, [])
    with Runner(engine) as runner:
        image = runner.vocabulary.special.image
        for tokens, seen in (([0, *[image] * 16, 20], IMAGES[:1] * 16), ([20] * 1023, [])):
            check_fits(engine, tokens, seen)
            with runner.answer(tokens, seen, max_new_tokens=1) as answer:
                types = [event.type for event in answer.events()]
            assert "response.done" in types
            assert "session.evicted" not in types


@pytest.mark.parametrize("form", ["zero", "attend_all"])
def test_an_answer_is_that_of_transformers_whatever_tokens_before_frames_attend(
    tmp_path: Path, form: str
) -> None:
    """As config.json says; imports of the published model say `attend_all`."""
    folder = save_tiny(tmp_path, tokens_before_first_frame=form, moss_stage="sft")
    with Runner(load_engine(folder, device="cpu", max_sessions=2)) as runner:
        tokens = runner.vocabulary.user_turn("Be short. ") + question(runner)
        options: dict[str, Any] = {"max_new_tokens": 6, "ignore_end": True, "likely": 0}
        alone = said(runner.answer(tokens, IMAGES, **options))
        both = runner.answers(tokens, IMAGES, [Sampling(), Sampling()], **options)
        assert [said(one)[0] for one in both] == [alone[0]] * 2
        pixels = runner.engine.pixels(IMAGES)
    model = MossVideoForConditionalGeneration.from_pretrained(folder).eval()
    wanted = model.generate(
        input_ids=torch.tensor([tokens]), pixel_values=pixels[None], max_new_tokens=6,
        min_new_tokens=6, do_sample=False,
    )  # fmt: skip
    assert [token for token, *_ in alone[2]] == wanted[0, len(tokens) :].tolist()


@pytest.fixture
def attending(tmp_path: Path) -> Engine:
    """Of a model in which tokens before the first frame attend all frames of a question."""
    folder = save_tiny(tmp_path, tokens_before_first_frame="attend_all", moss_stage="sft")
    return load_engine(folder, device="cpu", max_sessions=2)


def asked_beside(engine: Engine, disturb: Callable[[], None]) -> None:
    """Asks alone, then by pieces and beside a session that speaks, with what `disturb` does: the
    answer is the same, and the session goes on."""
    with Runner(engine) as runner:
        tokens = question(runner)
        options: dict[str, Any] = {"max_new_tokens": 4, "ignore_end": True}
        wanted = said(runner.answer(tokens, IMAGES, chunk=FRAMES, **options))
        disturb()
        speaking = runner.answer([5, 6], max_new_tokens=10**6, ignore_end=True)
        next(event for event in speaking.events() if event.type == "response.output_text.delta")
        assert said(runner.answer(tokens, IMAGES, chunk=4, **options)) == wanted
        assert not speaking.log.closed
        speaking.close("enough")


def test_frames_of_a_question_leave_turns_to_others_where_all_text_attends_them(
    attending: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are encoded part by part; one of the turns fails, and is computed again."""
    encode, encoded = attending.encode, list[int]()

    def counted(images: Any) -> Any:
        encoded.append(len(images))
        if len(encoded) == 2:
            raise RuntimeError("out of memory")
        return encode(images)

    asked_beside(attending, lambda: monkeypatch.setattr(attending, "encode", counted))
    assert encoded == [4, 4, 4, 2]


def test_frames_that_are_encoded_beside_a_step_that_fails_are_kept(
    attending: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is computed again, for each session alone."""
    encode, step, encoded, failed = attending.encode, attending.step, list[int](), list[bool]()

    def counted(images: Any) -> Any:
        encoded.append(len(images))
        return encode(images)

    def failing(steps: Any) -> Any:
        if len(encoded) == 2 and steps and not failed:
            failed.append(True)
            raise RuntimeError("out of memory")
        return step(steps)

    def disturb() -> None:
        monkeypatch.setattr(attending, "encode", counted)
        monkeypatch.setattr(attending, "step", failing)

    asked_beside(attending, disturb)
    assert (encoded, failed) == ([4, 4, 2], [True])


def test_a_video_longer_than_the_window_is_taken_in_by_pieces_as_a_stream(tmp_path: Path) -> None:
    """Else the features of all its frames are there at once: 13 GB of a thousand."""
    words, most = [], []
    for form in ("zero", "attend_all"):
        folder = save_tiny(tmp_path / form, tokens_before_first_frame=form, moss_stage="sft")
        engine = load_engine(folder, device="cpu", max_sessions=1, window=4)
        sizes, step = [0], engine.step

        def watched(steps: Any, step: Any = step, sizes: list[int] = sizes) -> Any:
            sizes.extend(len(one.frames) for one in steps)
            return step(steps)

        engine.step = watched  # type: ignore[method-assign]
        with Runner(engine) as runner:
            tokens = runner.vocabulary.user_turn("Be short. ") + question(runner)
            options: dict[str, Any] = {"max_new_tokens": 6, "ignore_end": True, "likely": 0}
            words.append(said(runner.answer(tokens, IMAGES, chunk=2, **options)))
        most.append(max(sizes))
    assert most == [2, 2]
    assert words[0] == words[1]
