"""What is wrong with a written conversation that no model has to look at."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.synthesis.candidate import Candidate, candidate_of, duplicate_of, fault


def conversation(role: str, asked: dict[int, str], answers: dict[int, str]) -> Candidate:
    written: dict[str, Any] = {
        name: [{"second": second, "text": text} for second, text in said.items()]
        for name, said in (("questions", asked), ("answers", answers))
    }
    return candidate_of(role, written)


ASK = {1: "Tell me when the cat jumps."}
GOOD = {
    "fire_once": (ASK, {4: "The cat jumps."}),
    "resident": (ASK, {4: "The cat jumps.", 6: "The cat jumps."}),
    "commentary": ({0: "Tell me what happens."}, {0: "A cat sits.", 3: "It jumps."}),
    "counting": ({0: "Count the jumps."}, {4: "One.", 6: "Two."}),
    "interruption": ({0: "What happens?", 2: "What colour is it?"}, {0: "A cat sits.", 2: "Red."}),
    "self_correction": ({1: "Where is the cat?"}, {1: "On the chair.", 5: "Now it is below."}),
    "never": (ASK, {}),
}
BAD = {
    "no answer": ("fire_once", ASK, {}, "form"),
    "two answers": ("fire_once", ASK, {3: "It jumps.", 5: "It jumps."}, "form"),
    "answered at once": ("fire_once", ASK, {1: "It jumps."}, "form"),
    "answered before": ("counting", {3: "Count the jumps."}, {2: "One."}, "form"),
    "never, but said": ("never", ASK, {4: "It jumps."}, "form"),
    "after the end": ("fire_once", ASK, {10: "It jumps."}, "form"),
    "before the start": ("fire_once", {-1: "When?"}, {3: "Now."}, "form"),
    "empty": ("fire_once", ASK, {4: "  "}, "form"),
    "one question alone": ("interruption", ASK, {2: "A cat.", 4: "Red."}, "form"),
    "nothing interrupted": ("interruption", {0: "What?", 2: "Which?"}, {3: "A.", 5: "B."}, "form"),
    "no correction": ("self_correction", ASK, {1: "Red.", 4: "red"}, "form"),
    "a second": ("fire_once", ASK, {4: "At second four it jumps."}, "leaked_time"),
    "a clock": ("fire_once", ASK, {4: "It jumps at 0:04."}, "leaked_time"),
    "a time": ("fire_once", ASK, {4: "It jumps after 3.5 s."}, "leaked_time"),
    "a file": ("fire_once", {1: "When does the video show a jump?"}, {4: "Now."}, "leaked_time"),
    "too long": ("fire_once", ASK, {8: "The cat jumps over the big red box now."}, "emission_rate"),
    "too dense": ("resident", ASK, {4: "The red cat jumps very high.", 5: "It jumps."},
                  "emission_rate"),
}  # fmt: skip


@pytest.mark.parametrize("role", GOOD)
def test_a_conversation_of_each_role_passes(role: str) -> None:
    assert fault(conversation(role, *GOOD[role]), 10, 4) is None


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_has_a_reason(name: str) -> None:
    role, asked, answers, reason = BAD[name]
    found = fault(conversation(role, asked, answers), 10, 4)
    assert found is not None
    assert found[0] == reason


def test_words_that_only_look_like_times_are_no_leak() -> None:
    said = {4: "The second cat jumps, one of two."}
    assert fault(conversation("fire_once", ASK, said), 10, 4) is None


def test_a_newer_question_may_cut_an_answer_off() -> None:
    asked, long = {0: "What happens?", 1: "Is it red?"}, "A big red cat sits on a chair."
    assert fault(conversation("interruption", asked, {0: long, 1: "Yes."}), 10, 4) is None


def test_a_double_asks_the_same_and_answers_in_the_same_seconds() -> None:
    first = conversation("fire_once", ASK, {4: "The cat jumps."})
    again = conversation("fire_once", {1: "tell me when the cat jumps"}, {4: "It jumps."})
    later = conversation("fire_once", ASK, {5: "The cat jumps."})
    other = conversation("fire_once", {1: "Tell me when the dog barks."}, {4: "It barks."})
    assert duplicate_of(again, [first], 0.9) == ASK[1]
    assert [duplicate_of(one, [first], 0.9) for one in (later, other)] == ["", ""]
