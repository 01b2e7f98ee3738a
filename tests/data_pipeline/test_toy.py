"""The toy world: what is said and asked is what is there, by a reckoning of the tests' own."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

import pytest

from data_pipeline.toy import captions
from data_pipeline.toy.build import make_story
from data_pipeline.toy.facts import (
    checklist,
    flags,
    of_still,
    of_story,
    of_text,
    still_facts,
    story_facts,
    timeline,
    track,
)
from data_pipeline.toy.stream import narration, question
from data_pipeline.toy.world import PLACES, SHAPES, Event, Story, Thing, simulate, still

STORIES = [simulate(seed, seconds=8, events=3) for seed in range(150)]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven"]
Seen = dict[str, tuple[str, str]]  # shape -> colour and place


def seen(state: tuple[Thing, ...]) -> Seen:
    return {thing.shape: (thing.colour, PLACES[thing.place]) for thing in state}


def what_differs(before: Seen, after: Seen) -> list[str]:
    """The sentences about two states, found by comparing them."""
    told = []
    for shape in sorted(before.keys() | after.keys()):
        if shape not in after:
            told.append(f"The {before[shape][0]} {shape} leaves.")
        elif shape not in before:
            told.append(f"A {after[shape][0]} {shape} comes.")
        elif before[shape][0] != after[shape][0]:
            told.append(f"The {before[shape][0]} {shape} turns {after[shape][0]}.")
        elif before[shape] != after[shape]:
            (row0, column0), (row1, column1) = (x[shape][1].split() for x in (before, after))
            way = {"bottom": "down", "top": "up"}[row1] if row0 != row1 else column1
            assert (row0 != row1) != (column0 != column1)
            told.append(f"The {before[shape][0]} {shape} moves {way}.")
    return told


def history(story: Story) -> list[tuple[int, str]]:
    """Every second with its sentence."""
    states = [seen(state) for state in story.states]
    return [
        (second, told)
        for second in range(1, len(states))
        for told in what_differs(states[second - 1], states[second])
    ]


def past(told: str) -> str:
    for now, then in (
        ("comes", "came"),
        ("leaves", "left"),
        ("moves", "moved"),
        ("turns", "turned"),
    ):
        told = told.replace(now, then)
    return told[0].lower() + told[1:].rstrip(".")


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
    if task == "at":
        return dict(told)[NUMBERS.index(words[-1])].rstrip(".")
    if task == "direction":
        name = " ".join(words[-3:-1])
        (way,) = [t.rstrip(".").split()[-1] for _, t in told if f"{name} moves" in t]
        return way
    if task == "when":
        clauses = {past(t): second for second, t in told}
        return f"at second {NUMBERS[clauses[question.split('that ')[1].rstrip('?')]]}"
    raise AssertionError(task)


def there(name: list[str], now: Seen) -> bool:
    """Whether `circle`, or `red shape`, is in a state."""
    return name[0] in now if len(name) == 1 else name[0] in {colour for colour, _ in now.values()}


def check(qa: captions.QA, now: Seen, told: list[tuple[int, str]]) -> None:
    assert qa.answer.lower().rstrip(".") == expected(qa.question, qa.task, now, told).lower()
    if qa.options:
        assert qa.answer in qa.options
        assert len(set(qa.options)) == len(qa.options)


def test_answers_about_clips_follow_from_their_states() -> None:
    rng, tasks = random.Random(0), Counter[str]()
    for story in STORIES * 12:
        asked = captions.ask_story(story, rng)
        for qa in asked:
            check(qa, seen(story.states[-1]), history(story))
        tasks[asked[0].task] += 1  # what is judged
        named = [qa.question for qa in asked if qa.task not in ("order", "at", "exists")]
        about = [shape for question in named for shape in SHAPES if shape in question]
        assert len(set(about)) == len(about)
    kinds = {"colour", "shape", "place", "exists", "count", "order", "at", "direction", "when"}
    assert tasks.keys() == kinds
    assert min(tasks.values()) > 0.05 * tasks.total()
    assert max(tasks.values()) < 0.2 * tasks.total()


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
        names = re.findall(r"a (\w+) (\w+)(?: (\w+ (?:left|right)))?", first.lower())
        things = {shape: (colour, place) for colour, shape, place in names}
        events = list(enumerate(sentence.strip() for sentence in later))
        for qa in asked:
            check(qa, things, events)


def test_facts_about_pictures_name_each_thing_once_and_are_true() -> None:
    rng = random.Random(0)
    for seed in range(300):
        check_facts(still_facts(still(seed), rng), seen(still(seed)))


def check_facts(said: str, now: Seen) -> None:
    """A true fact of each thing."""
    told = [fact.strip(".").split() for fact in re.findall(r"[^.]+\.", said)]
    assert len(told) == len(now)
    for words in told:
        where = " ".join(words[-2:])
        if words[-1] == "there":
            name = words[1 : words.index("is")]
            assert there(name, now) == ("not" not in words)
        elif words[1] in ("left", "right"):
            colour, shape = words[-2:]
            assert now[shape] == (colour, " ".join(words[:2]).lower())
        elif "one" in words:
            assert now[words[-3].strip(",")] == (words[1], where)
        else:
            assert now[words[1]] == (words[-3].strip(","), where)


def check_still(said: str, now: Seen) -> str:
    """True facts of all things or their caption, and a true checklist; which of the two it is."""
    entries = re.findall(r"(\w+): (yes|no)\.", said)
    check_entries(dict(entries), now)
    rest = re.sub(r"\w+: (yes|no)\. ?", "", said).strip()
    if things(rest) == now:
        return "caption"
    check_facts(rest, now)
    return "facts"


def check_entries(told: dict[str, str], now: Seen) -> None:
    found = now.keys() | {colour for colour, _ in now.values()}
    assert len(told) == 6
    assert told == {name: "yes" if name.lower() in found else "no" for name in told}


def things(caption: str) -> Seen:
    """What `A red circle top left and a blue square bottom right.` names."""
    names = re.findall(r"a (\w+) (\w+) (\w+ (?:left|right))", caption.lower())
    return {shape: (colour, place) for colour, shape, place in names}


def test_pictures_are_told_by_all_their_things_and_a_checklist() -> None:
    rng, kinds = random.Random(0), Counter[str]()
    for seed in range(300):
        kinds[check_still(of_still(still(seed), rng), seen(still(seed)))] += 1
    assert min(kinds["caption"], kinds["facts"]) > 60


def test_scenes_in_words_are_told_again_with_facts_and_stories_with_their_ends() -> None:
    rng, of_stories, other_order = random.Random(0), 0, 0
    for seed, story in enumerate(STORIES):
        now = seen(still(seed))
        told, said = of_text(still(seed), story, rng)
        if told == f"{captions.describe_places(still(seed))} ":
            again, _, facts = said.partition(". ")
            assert things(again) == now
            other_order += [*things(again)] != [*now]
            assert check_still(facts, now) == "facts" or len(now) == 1
            continue
        of_stories += 1
        assert told == f"{captions.narrate(story)} "
        happened = [lowered(sentence) for _, sentence in history(story)]
        assert set(re.findall(r"[^ .][^.]*\.", said)) == {
            f"First {happened[0]}",
            f"Last {happened[-1]}",
        }
    assert 30 < of_stories < 90
    assert other_order > 20


def test_clips_are_told_in_two_ways() -> None:
    rng, kinds = random.Random(0), Counter[str]()
    ways = {
        "flags": r"(left|right|up|down|came|turned \w+): (yes|no), ",
        "timeline": r"Second one: ",
        "track": r"(Circle|Square|Triangle|Cross): \w+",
        "facts": r"(At the end |First |Last | at second )",
    }
    for story in STORIES * 2:
        said = of_story(story, rng)
        found = {way for way, pattern in ways.items() if re.search(pattern, said)}
        assert len(found) == 2
        kinds.update(found)
    assert 0.5 < kinds["flags"] / (2 * len(STORIES)) < 0.8
    assert min(kinds.values()) > len(STORIES) / 2


def test_facts_about_clips_are_true() -> None:
    rng, kinds = random.Random(0), set()
    for story in STORIES * 4:
        told = history(story)
        clauses = {past(sentence): second for second, sentence in told}
        facts = re.findall(r"[^ .][^.]*", story_facts(story, rng))
        assert facts
        for fact in facts:
            what, _, when = fact.rpartition(" at second ")
            word, _, event = fact.partition(" ")
            if fact.startswith("At the end"):
                kinds.add("end")
            elif what:
                kinds.add("when")
                assert clauses[what[0].lower() + what[1:]] == NUMBERS.index(when)
            else:
                kinds.add(word)
                assert lowered(told[0 if word == "First" else -1][1]) == f"{event}."
    assert kinds == {"end", "First", "Last", "when"}


def test_timelines_tell_every_second() -> None:
    for story in STORIES:
        events = dict(history(story))
        told = [
            f"Second {NUMBERS[second]}: {lowered(events.get(second, 'Nothing new.'))}"
            for second in range(1, 8)
        ]
        assert timeline(story) == " ".join(told)


def test_checklists_say_of_shapes_and_colours_whether_they_are_there() -> None:
    rng, names = random.Random(0), set[str]()
    for seed in range(200):
        told = dict(re.findall(r"(\w+): (yes|no)\.", checklist(still(seed), rng)))
        check_entries(told, seen(still(seed)))
        names |= told.keys()
    assert len(names) == 10


def test_flags_say_of_each_event_in_which_seconds_it_happened() -> None:
    rng = random.Random(0)
    for story in STORIES:
        happened: dict[str, list[int]] = {}
        for second, told in history(story):
            happened.setdefault(past(told), []).append(second)
        expected = {
            event: ", ".join("yes" if second in seconds else "no" for second in range(1, 8))
            for event, seconds in happened.items()
        }
        said = re.findall(r"([^.:]+): ([^.]+)\.", flags(story, rng))
        assert {lowered(event.strip()): told for event, told in said} == expected


def test_tracks_follow_one_thing_of_the_story_through_its_seconds() -> None:
    rng = random.Random(0)
    for story in STORIES:
        shape, _, told = track(story, rng).lower().rstrip(".").partition(": ")
        assert any(shape in sentence for _, sentence in history(story))
        states = [seen(state) for state in story.states]
        assert told.split(", ") == [
            " ".join(state[shape]) if shape in state else "gone" for state in states
        ]


def lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def spoken(messages: list[dict[str, str]]) -> list[tuple[int, str]]:
    """The sentences of all assistant turns with the second in which each begins."""
    found: list[tuple[int, str]] = []
    second, goes_on = -1, False
    for message in messages:
        if message["role"] == "user":
            continue
        for i, part in enumerate(message["content"].split("<|video|>")):
            second += i > 0
            words = part.replace("<|silence|>", "").strip()
            if words and goes_on:
                found[-1] = (found[-1][0], f"{found[-1][1]} {words}")
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
    corrected = 0
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

        facts = [fact(state) for state in states[watched - 1 :]]
        changes = [
            (second, new)
            for second, (old, new) in enumerate(pairwise(facts), watched)
            if old != new
        ]
        assert said[0] == (watched - 1, facts[0].capitalize() + ".")
        assert [(at, text.rstrip(".").split(maxsplit=3)[-1]) for at, text in said[1:]] == changes
        corrected += bool(changes)
    assert corrected > 60
