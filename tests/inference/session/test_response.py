"""Tokens of a response become text as soon as its characters are whole."""

from __future__ import annotations

import time

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from inference.session.response import Response
from tests.inference.session.scripted import started


def test_text_comes_in_whole_characters(tokenizer: Tokenizer) -> None:
    said = tokenizer.encode("äöü", add_special_tokens=False).ids
    assert len(said) == 6  # bytes
    model = started(tokenizer)
    model.frame()
    model.say([*said, model.special.silence])
    assert [d["delta"] for d in model.emitted("response.output_text.delta")] == ["ä", "ö", "ü"]
    model.frame(1.0)
    model.say([*said[:3], model.special.silence])  # it ends in the middle of a character
    assert model.emitted("response.done")[1]["text"] == "ä"
    assert [d["delta"] for d in model.emitted("response.output_text.delta")][3:] == ["ä"]


@settings(deadline=None)
@given(st.lists(st.integers(0, 511), max_size=40))
@example([169, 94])
def test_the_pieces_of_a_response_are_its_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Whatever the tokens: halves of characters, special ones. At the end, half a character is left
    out; each piece comes as early as it can."""
    response = Response(tokenizer, "s")
    said = ""
    for number, token in enumerate(tokens, 1):
        said += response.append(token)
        whole = tokenizer.decode(tokens[:number], skip_special_tokens=True)
        # Up to three bytes that may become a character are held back; each may be a mark.
        kept = [n for n in range(4) if whole.endswith("\ufffd" * n)]
        assert said in [whole[: len(whole) - n] for n in kept]
    assert response.text == said


def test_bytes_that_become_no_character_are_told_at_once(tokenizer: Tokenizer) -> None:
    start, other = (tokenizer.encode(c, add_special_tokens=False).ids[0] for c in "äa")
    following = tokenizer.encode("ä", add_special_tokens=False).ids[1]
    response = Response(tokenizer, "s")
    pieces = [response.append(t) for t in [following, start, other, start, start, following, start]]
    assert pieces == ["\ufffd", "", "\ufffda", "", "\ufffd", "ä", ""]
    assert response.text == "\ufffd\ufffda\ufffdä"


def test_a_run_of_lone_bytes_costs_each_token_the_same(tokenizer: Tokenizer) -> None:
    lone = tokenizer.encode("ä", add_special_tokens=False).ids[1]

    def said(count: int) -> tuple[float, Response]:
        """Seconds that this thread has computed."""
        response, began = Response(tokenizer, "s"), time.thread_time()
        for _ in range(count):
            response.append(lone)
        return time.thread_time() - began, response

    few = min(said(2_000)[0] for _ in range(3))
    many, response = min((said(40_000) for _ in range(2)), key=lambda found: found[0])
    assert many < 100 * few  # 20 times; 400 where all is read again
    assert response.text == "\ufffd" * 40_000
