"""What pretraining says of the toy world besides captions is true, reckoned anew."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import pairwise

from data_pipeline.toy import captions
from data_pipeline.toy.facts import (
    checklist,
    of_still,
    of_story,
    of_text,
    seconds_of_events,
    states_of_one_shape,
    still_facts,
    story_facts,
    timeline,
)
from data_pipeline.toy.world import still
from tests.data_pipeline.toy.truth import (
    NUMBERS,
    STORIES,
    Seen,
    history,
    lowered,
    past,
    seen,
    there,
    things,
)


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


def test_pictures_are_told_by_all_their_things_and_a_checklist() -> None:
    rng, kinds = random.Random(0), Counter[str]()
    for seed in range(300):
        kinds[check_still(of_still(still(seed), rng), seen(still(seed)))] += 1
    assert min(kinds["caption"], kinds["facts"]) > 60


def test_scenes_in_words_are_told_again_with_facts_and_stories_with_their_ends() -> None:
    rng, of_stories, other_order = random.Random(0), 0, 0
    comparisons = set()
    for seed, story in enumerate(STORIES):
        now = seen(still(seed))
        told, said = of_text(still(seed), story, rng)
        if told == f"{captions.describe_places(still(seed))} ":
            again, _, facts = said.partition(". ")
            assert things(again) == now
            other_order += [*things(again)] != [*now]
            assert check_still(facts, now) == "facts"
            continue
        of_stories += 1
        assert told == f"{captions.narrate(story)} "
        happened = [lowered(sentence) for _, sentence in history(story)]
        sentences = set(re.findall(r"[^ .][^.]*\.", said))
        ends = {f"First {happened[0]}", f"Last {happened[-1]}"}
        assert len(sentences) == 3
        assert ends < sentences
        (compared,) = sentences - ends
        sides = re.split(" (before|after) ", lowered(compared).rstrip("."))
        sooner, later = sides[::2] if sides[1] == "before" else sides[::-2]
        order = [past(sentence) for sentence in happened]
        assert (sooner, later) in pairwise(order)
        comparisons.add(sides[1])
    assert comparisons == {"before", "after"}
    assert 30 < of_stories < 90
    assert other_order > 20


def test_clips_are_told_in_two_ways() -> None:
    rng, kinds = random.Random(0), Counter[str]()
    ways = {
        "seconds_of_events": r"(left|right|up|down|came|turned \w+): (yes|no), ",
        "timeline": r"Second one: ",
        "track": r"(Circle|Square|Triangle|Cross): \w+",
        "facts": r"(At the end |First |Last | at second )",
    }
    for story in STORIES * 2:
        said = of_story(story, rng)
        found = {way for way, pattern in ways.items() if re.search(pattern, said)}
        assert len(found) == 2
        kinds.update(found)
    assert 0.5 < kinds["seconds_of_events"] / (2 * len(STORIES)) < 0.8
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


def test_timelines_tell_every_second_in_any_order() -> None:
    rng, in_order = random.Random(0), 0
    for story in STORIES:
        events = dict(history(story))
        told = [
            f"Second {NUMBERS[second]}: {lowered(events.get(second, 'Nothing new.'))}"
            for second in range(1, 8)
        ]
        said = re.findall(r"Second [^.]*\.", timeline(story, rng))
        assert sorted(said) == sorted(told)
        in_order += said == told
    assert in_order < 5


def test_checklists_say_of_shapes_and_colours_whether_they_are_there() -> None:
    rng, names = random.Random(0), set[str]()
    for seed in range(200):
        told = dict(re.findall(r"(\w+): (yes|no)\.", checklist(still(seed), rng)))
        check_entries(told, seen(still(seed)))
        names |= told.keys()
    assert len(names) == 8


def test_seconds_of_events_say_of_each_event_in_which_seconds_it_happened() -> None:
    rng = random.Random(0)
    for story in STORIES:
        happened: dict[str, list[int]] = {}
        for second, told in history(story):
            happened.setdefault(past(told), []).append(second)
        expected = {
            event: ", ".join("yes" if second in seconds else "no" for second in range(1, 8))
            for event, seconds in happened.items()
        }
        said = re.findall(r"([^.:]+): ([^.]+)\.", seconds_of_events(story, rng))
        assert {lowered(event.strip()): told for event, told in said} == expected


def test_tracks_follow_one_thing_of_the_story_through_its_seconds() -> None:
    rng = random.Random(0)
    for story in STORIES:
        shape, _, told = states_of_one_shape(story, rng).lower().rstrip(".").partition(": ")
        assert any(shape in sentence for _, sentence in history(story))
        states = [seen(state) for state in story.states]
        assert told.split(", ") == [
            " ".join(state[shape]) if shape in state else "gone" for state in states
        ]
