"""Tokens of a response become text as soon as its characters are whole."""

from __future__ import annotations

from hypothesis import given, settings
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
    model.say([*said[:3], model.special.silence])
    assert model.emitted("response.done")[1]["text"] == "ä\ufffd"
    pieces = [d["delta"] for d in model.emitted("response.output_text.delta")][3:]
    assert "".join(pieces) == "ä\ufffd"


@settings(deadline=None)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_the_pieces_of_a_response_are_its_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Whatever the tokens: halves of characters, special ones."""
    response = Response(tokenizer, "s")
    pieces = [response.append(token) for token in tokens]
    assert "".join(pieces) + response.flush() == tokenizer.decode(tokens, skip_special_tokens=True)
