"""The toy world: what is said and asked is what is there, by a reckoning of the tests' own."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from data_pipeline.toy import captions
from data_pipeline.toy.build import make_story
from data_pipeline.toy.stream import narration, question
from data_pipeline.toy.world import Event, Story, Thing, simulate, still
from tests.data_pipeline.toy.truth import (
    NUMBERS,
    STORIES,
    Seen,
    history,
    seen,
    there,
    things,
)


def test_events_are_what_the_states_show() -> None:
    for story in STORIES:
        told = [(event.second, captions.tell(event)) for event in story.events]
        assert told == history(story)
        assert len(told) == 3


def test_every_kind_of_event_happens() -> None:
    kinds = [event.kind for story in STORIES for event in story.events]
    assert {kind: kinds.count(kind) > 40 for kind in set(kinds)} == dict.fromkeys(
        ("come", "leave", "move", "turn"), True
    )


def test_things_never_share_a_place_a_shape_or_a_colour() -> None:
    for story in STORIES:
        for state in story.states:
            for part in ("place", "shape", "colour"):
                assert len({getattr(thing, part) for thing in state}) == len(state)
            assert 1 <= len(state) <= 3


def test_events_keep_their_distance_and_must_fit() -> None:
    for seed in range(50):
        times = [event.second for event in simulate(seed, seconds=9, events=3, gap=3).events]
        assert all(later - sooner >= 3 for sooner, later in pairwise(times))
        assert times[-1] < 9
    with pytest.raises(ValueError, match="5 events, 3 s apart, do not fit into 9 seconds"):
        simulate(0, seconds=9, events=5, gap=3)


def test_the_same_seed_gives_the_same_story() -> None:
    assert simulate(5, 8, 3) == STORIES[5]
    assert simulate(5, 8, 3) != simulate(6, 8, 3)


def test_captions_say_what_happened() -> None:
    circle, square = Thing("circle", "red", 0, 0.1, 0, 0), Thing("square", "blue", 3, 0.1, 0, 0)
    events = (Event(2, "leave", "red circle"), Event(4, "turn", "blue square", "green"))
    story = Story(((circle, square),) * 2, events)
    assert captions.describe((circle,)) == "A red circle."
    places = "A red circle top left and a blue square bottom right."
    assert captions.describe_places((circle, square)) == places
    assert captions.narrate(story) == (
        "A red circle and a blue square. The red circle leaves. The blue square turns green."
    )
    assert captions.narrate_order(story) == (
        captions.narrate(story) + " The red circle left before the blue square turned green."
    )


def expected(question: str, task: str, now: Seen, told: list[tuple[int, str]]) -> str:
    """The answer to a question, found in what is seen now and what was told."""
    words = question.rstrip("?").replace(" at the end", "").split()
    if task == "colour":
        return now[words[-1]][0]
    if task == "shape":
        return next(shape for shape, (colour, _) in now.items() if colour == words[-1])
    if task == "count":
        return NUMBERS[len(now)]
    if task == "place":
        return now[words[-1]][1]
    if task == "exists":
        return "yes" if there(words[3:], now) else "no"
    if task == "order":
        return (told[0] if "first" in question else told[-1])[1].rstrip(".")
    raise AssertionError(task)


def check(qa: captions.QA, now: Seen, told: list[tuple[int, str]]) -> None:
    assert qa.answer.lower().rstrip(".") == expected(qa.question, qa.task, now, told).lower()
    if qa.options:
        assert qa.answer in qa.options
        assert len(set(qa.options)) == len(qa.options)


def test_answers_about_the_end_of_clips_follow_from_their_last_state() -> None:
    rng, tasks = random.Random(0), Counter[str]()
    for story in STORIES * 6:
        end = story.states[-1]
        asked = captions.ask_end(end, rng)
        for qa in asked:
            assert qa.question.endswith(" at the end?")
            check(qa, seen(end), [])
        tasks[asked[0].task] += 1  # what is judged
        about = [qa for qa in asked if qa.task != "count"]
        assert len(about) == len(end)
    assert tasks.keys() == {"colour", "shape", "place", "exists", "count"}
    assert min(tasks.values()) > 0.1 * tasks.total()
    assert max(tasks.values()) < 0.3 * tasks.total()


def test_answers_about_pictures_follow_from_them() -> None:
    rng, answers, first, tasks = random.Random(0), [], [], set()
    for seed in range(1000):
        state = still(seed)
        asked = captions.ask_still(state, rng)
        if len(asked) == 4 and {qa.task for qa in asked} == {"exists"}:
            assert len({qa.question for qa in asked}) == 4
            first.append(asked[0].answer)
        else:
            assert len(asked) - (asked[0].task == "count") == len(state)
        for qa in asked:
            check(qa, seen(state), [])
            tasks.add(qa.task)
            answers += [qa.answer] if qa.task == "exists" else []
    assert tasks == {"colour", "shape", "count", "place", "exists"}
    assert 0.3 < answers.count("Yes.") / len(answers) < 0.7
    assert len(first) > 100
    assert 0.4 < first.count("Yes.") / len(first) < 0.6  # what is judged


def test_texts_tell_all_that_their_questions_need() -> None:
    rng = random.Random(0)
    for seed, story in enumerate(STORIES):
        told, asked = captions.ask_text(still(seed), story, rng)
        first, *later = re.findall(r"[^.]+\.", told)
        now = things(first)
        events = list(enumerate(sentence.strip() for sentence in later))
        for qa in asked:
            check(qa, now, events)


def spoken(messages: list[dict[str, str]]) -> list[tuple[int, str]]:
    """The sentences of all assistant turns with the second in which each begins."""
    found: list[tuple[int, str]] = []
    second, goes_on = -1, False
    for message in messages:
        if message["role"] == "user":
            continue
        for i, part in enumerate(message["content"].split("<|video|>")):
            second += i > 0
            words = part.replace("<|silence|>", "")
            if words and goes_on:
                found[-1] = (found[-1][0], found[-1][1] + words)
            elif words:
                found.append((second, words))
            assert len(words.split()) <= 5
            assert part == "" or part.endswith("<|silence|>") or words
            goes_on = bool(words) and not part.endswith("<|silence|>")
    return found


def streams(count: int) -> list[Story]:
    return [make_story("realtime_sft", seed, random.Random(seed)) for seed in range(count)]


def test_narration_tells_each_event_within_a_second_of_it() -> None:
    for story in streams(100):
        live = narration(story)
        told = [(0, captions.describe(story.states[0])), *history(story)]
        assert list(live.speech.items()) == told
        for (said_at, said), (second, sentence) in zip(spoken(live.messages), told, strict=True):
            assert said == sentence
            assert second <= said_at <= second + 1


def test_a_question_is_answered_and_the_answer_kept_right() -> None:
    corrected, forms = 0, Counter[str]()
    for seed, story in enumerate(streams(200)):
        live = question(story, random.Random(seed))
        watched = live.messages[1]["content"].count("<|video|>")
        assert live.messages[1]["content"] == "<|video|><|silence|>" * watched
        assert live.qa is not None
        subject = live.messages[2]["content"].rstrip("?").split()[-1]
        said = spoken(live.messages)
        states = [seen(state) for state in story.states]

        def fact(state: Seen, task: str = live.qa.task, subject: str = subject) -> str:
            if task == "count":
                return NUMBERS[len(state)]
            return state[subject][task == "place"] if subject in state else "gone"

        first, _, rest = live.messages[3]["content"].partition("<|video|>")
        form = "within" if first and not first.endswith("<|silence|>") else "after"
        form = form if first else "before"  # when the next frame comes
        asked = watched - (form != "before")  # the last second that is seen
        facts = [fact(state) for state in states[asked:]]
        changes = [
            (second, new)
            for second, (old, new) in enumerate(pairwise(facts), asked + 1)
            if old != new
        ]
        answer = facts[0].capitalize() + "."
        assert said[0] == (asked, answer)
        if form == "within":
            assert rest.startswith(answer.removeprefix(first) + "<|silence|>")
            assert first == answer[: len(first)] != answer
            changes = [  # a correction waits for the end of the answer
                (second + (second == watched), new) for second, new in changes
            ]
        assert [(at, text.rstrip(".").split(maxsplit=3)[-1]) for at, text in said[1:]] == changes
        corrected += bool(changes)
        forms[form] += 1
    assert corrected > 60
    assert 80 < forms["after"] < 120
    assert min(forms["before"], forms["within"]) > 35
