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
    still_facts,
    timeline,
    tracks,
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


def test_clips_are_told_by_their_tracks_and_their_seconds_in_any_order() -> None:
    rng, first = random.Random(0), Counter[str]()
    for story in STORIES:
        texts = re.findall(r"(?:Second|Colours|Places)[^.]*\.", of_story(story, rng))
        kinds = [text.split()[0] == "Second" for text in texts]
        assert kinds.count(True) == 7
        assert 1 <= kinds.count(False) <= 4
        assert kinds in (sorted(kinds), sorted(kinds, reverse=True))
        first[texts[0].split()[0]] += 1
    assert first["Second"] > 40
    assert first["Colours"] + first["Places"] > 40


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


def test_tracks_follow_what_changes_through_the_seconds() -> None:
    rng = random.Random(0)
    for story in STORIES:
        states = [seen(state) for state in story.states]
        expected = {}
        for shape in {shape for state in states for shape in state}:
            looks = [state.get(shape, ("gone", "gone")) for state in states]
            colours, places = ([look[part] for look in looks] for part in (0, 1))
            if len({*colours}) > 1:
                expected[f"Colours of the {shape}"] = ", ".join(colours)
            if len({*places} - {"gone"}) > 1:
                expected[f"Places of the {shape}"] = ", ".join(places)
        told = re.findall(r"([^.:]+): ([^.]+)\.", tracks(story, rng))
        assert {name.strip(): values for name, values in told} == expected
