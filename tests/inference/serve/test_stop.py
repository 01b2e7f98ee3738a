"""Stop texts, against Python's own search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.serve.stop import StopFilter


def filtered(pieces: list[str], stops: list[str], keep: bool = False) -> str:
    text, out = StopFilter(stops, keep), ""
    for piece in pieces:
        out += text.append(piece)
        if text.stopped:
            return out
    return out + text.flush()


@pytest.mark.parametrize("sizes", [1, 2, 3, 7])
def test_stop_texts_are_found_across_pieces(sizes: int) -> None:
    said = "one two three stop four"
    pieces = [said[start : start + sizes] for start in range(0, len(said), sizes)]
    assert filtered(pieces, ["stop", "thrice"]) == "one two three "
    assert filtered(pieces, ["stop", "thrice"], keep=True) == "one two three stop"
    assert filtered(["a st", "and sto"], ["stop"]) == "a stand sto"


def test_a_stop_text_ends_the_answer_only_where_it_may() -> None:
    """As vLLM has it with min_tokens: what is complete before is text, what begins before may end
    it."""
    for stops, pieces, wanted in (
        (["aa"], [("a", False), ("a", False), ("b", True), ("aa", True)], "aab"),
        (["aa"], [("aa", False), ("a", True), ("b", True)], "a"),
        (["stop"], [("stop st", False), ("op it", True)], "stop "),
        (["stop"], [("stop", False), ("", True)], "stop"),
    ):
        text, out = StopFilter(stops), ""
        for piece, ends in pieces:
            out += "" if text.stopped else text.append(piece, ends=ends)
        assert out + text.flush() == wanted


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_the_answer_ends_before_what_is_complete_first(pieces: list[str], stops: list[str]) -> None:
    said = "".join(pieces)
    ends = [(said.find(stop) + len(stop), -len(stop)) for stop in stops if stop in said]
    wanted = said if not ends else said[: sum(min(ends))]
    assert filtered(pieces, stops) == wanted


def test_no_more_is_held_back_than_may_begin_a_stop_text() -> None:
    text = StopFilter(["aab"])
    assert [text.append(c) for c in "aaaacaab"] == ["", "", "a", "a", "aac", "", "", ""]
    assert text.stopped
