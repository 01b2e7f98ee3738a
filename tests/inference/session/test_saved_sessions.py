"""A session that is saved, at any moment, goes on as if it had not been."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from data_pipeline.tokens import SpecialTokens
from inference.session.inputs import Frame
from inference.session.response import Vocabulary
from inference.session.session_state import resume, state_of
from inference.session.stats import Stats
from tests.inference.session.scripted import BLACK, Model, make, started


def test_a_session_saved_between_any_two_inputs_goes_on_the_same(
    tokenizer: Tokenizer, words: list[int]
) -> None:
    """Words, names of responses, seconds: also in the middle of a response, with a question that
    waits, a response that is cancelled or full, an end that is due."""
    special = SpecialTokens.from_tokenizer(tokenizer)
    vocabulary = Vocabulary.of(tokenizer)

    def restore(model: Model) -> None:
        state = torch.load(_file(state_of(model.session)), weights_only=True)
        model.session = resume(state, vocabulary, Stats(), model.now, None)

    def frame(model: Model) -> None:
        model.session.push(Frame(BLACK, model.session.next_second, model.now))

    say = [lambda model, token=token: model.step(token) for token in (*words, special.silence)]
    script: list[Callable[[Model], object]] = [
        frame, *say[:2], frame, say[2], lambda model: model.ask("Who is it?"), *say[:2],
        lambda model: model.session.cancel(), frame, *say[:3], frame, say[-1],
        lambda model: model.frame(7.0, "And now?"), *say[:2], lambda model: model.session.end(),
        frame, say[0],
    ]  # fmt: skip

    def play_script(cut: int) -> tuple[list[int], float, list[str]]:
        model = started(tokenizer, max_new_tokens=3, pace=None)
        for number, action in enumerate(script):
            if number in (cut, cut + 3):
                restore(model)
            action(model)
        gaps = model.session.stats.summary().get("inter_token_ms", {"p99": 250.0})
        assert gaps["p99"] == 250  # a step of the scripted model
        assert model.session.over
        names = [done["response_id"] for done in model.emitted("response.done")]
        return model.context, model.session.next_second, names

    whole = play_script(-9)
    assert whole[2] == [f"s-{number}" for number in range(1, len(whole[2]) + 1)]
    for cut in range(len(script)):
        context, second, names = play_script(cut)
        assert (context, second) == whole[:2]
        assert names == whole[2][len(whole[2]) - len(names) :]


def test_a_session_saved_in_a_long_prompt_reports_that_silence_is_its_answer(
    tokenizer: Tokenizer,
) -> None:
    model = started(tokenizer)
    model.frame()
    model.step(model.special.silence)
    model.ask("Who is it? " * 60)
    first = model.session.next_step(model.now)
    assert first is not None
    assert not first.sample  # more of the prompt follows
    state = torch.load(_file(state_of(model.session)), weights_only=True)
    model.session = resume(state, Vocabulary.of(tokenizer), Stats(), model.now, None)
    while not (request := model.session.next_step(model.now)).sample:  # type: ignore[union-attr]
        pass
    assert request is not None
    model.session.on_token(request, model.special.silence, model.now + 1)
    assert [state["state"] for state in model.emitted("session.state")] == ["silent"]
    assert model.session.stats.summary()["ttft_ms"]["p50"] == 1000


def _file(state: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_saved_session_of_another_version_is_refused(tokenizer: Tokenizer) -> None:
    made = make(tokenizer)
    state, vocabulary = state_of(made), Vocabulary.of(tokenizer)
    assert resume(state, vocabulary, Stats(), 0.0, None).config == made.config
    del state["version"]  # as the first version had it
    with pytest.raises(ValueError, match="of version 1: this program reads version 4"):
        resume(state, vocabulary, Stats(), 0.0, None)
