"""Plays a model that knows the toy world and errs at a known rate, both the one that watches and
the one that writes (tools.bench.endpoint serves it).

What it sees are pictures that it knows: each belongs to a second of a story. What it writes follows
from the captions that it is given, right or wrong, as a language model's would.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.toy.captions import NUMBERS, describe, sentence, tell, yes_or_no
from data_pipeline.toy.stream import NARRATE
from data_pipeline.toy.world import COLOURS, DIRECTIONS, SHAPES, Event, Story

TextAt = dict[str, Any]  # `second`, `text`
_KINDS = {"comes": "come", "leaves": "leave", "moves": "move", "turns": "turn"}
_EVENT = re.compile(rf"(?:A|The) (\w+ \w+) ({'|'.join(_KINDS)}) ?(\w*)\.")
_NAME = re.compile(r"[Aa] (\w+) (\w+)")
_WHEN, _WHENEVER = "Tell me when ", "Tell me each time a shape "
_COUNT, _COLOUR = "Count how often a shape ", "What colour is the "
_THERE, _HOW_MANY = "Is there a ", "How many shapes are there?"


@dataclass(frozen=True)
class Facts:
    """What happens in a clip: its first scene, and the events after it; seconds of the clip."""

    scene: str
    events: tuple[Event, ...]

    def colours(self, second: int) -> dict[str, str]:
        """The colour of each shape that is there at a second."""
        there = {shape: colour for colour, shape in _NAME.findall(self.scene)}
        for event in self.events:
            if event.second > second:
                continue
            if event.kind == "come":
                there[event.shape] = event.who.split()[0]
            elif event.kind == "turn":
                there[event.shape] = event.to
            elif event.kind == "leave":
                there.pop(event.shape, None)
        return there


def of_story(story: Story, start: int = 0) -> Facts:
    """The facts of a clip that begins at second `start` of a story."""
    events = [Event(event.second - start, event.kind, event.who, event.to)
              for event in story.events if event.second > start]  # fmt: skip
    return Facts(describe(story.states[start]), tuple(events))


def of_timeline(data: Mapping[str, Any]) -> Facts:
    """The facts that captions state."""
    events = []
    for caption in data["events"]:
        match = _EVENT.fullmatch(caption["text"])
        if match and caption["second"] > 0:
            kind: Any = _KINDS[match[2]]
            events.append(Event(caption["second"], kind, match[1], match[3]))
    events.sort(key=lambda event: event.second)
    return Facts(data["scenes"][0]["text"], tuple(events))


def spoken(facts: Facts, questions: Sequence[TextAt], seconds: int) -> dict[int, str]:
    """The texts that are due at each second; from its second on, the latest question counts."""
    texts: dict[int, str] = {}
    ends = [question["second"] for question in questions[1:]] + [seconds]
    for question, end in zip(questions, ends, strict=True):
        begin = question["second"]
        answers = _answers(facts, question["text"], begin, range(begin + 1, end))
        texts |= {second: text for second, text in answers.items() if begin <= second < end}
    return texts


def _answers(facts: Facts, question: str, begin: int, later: range) -> dict[int, str]:
    events = [event for event in facts.events if event.second in later]
    descriptions = {event.second: tell(event) for event in events}
    if question == NARRATE:
        return ({0: facts.scene} if begin == 0 else {}) | descriptions
    if question.startswith(_WHEN):
        description = sentence(question.removeprefix(_WHEN).rstrip("."))
        return next(
            ({second: text} for second, text in descriptions.items() if text == description), {}
        )
    if question.startswith(_WHENEVER):
        kind = _KINDS[question.removeprefix(_WHENEVER).rstrip(".")]
        return {event.second: tell(event) for event in events if event.kind == kind}
    if question.startswith(_COUNT):
        kind = _KINDS[question.removeprefix(_COUNT).rstrip(".")]
        those = [event for event in events if event.kind == kind]
        return {event.second: sentence(NUMBERS[i]) for i, event in enumerate(those, 1)}
    if question.startswith(_THERE):
        shape = question.removeprefix(_THERE).rstrip("?")
        return {begin: sentence(yes_or_no(shape in facts.colours(begin)))}
    return _corrected(facts, question, begin, later)


def _corrected(facts: Facts, question: str, begin: int, later: range) -> dict[int, str]:
    """The answer now, and its correction each time that it changes."""

    def answer(second: int) -> str:
        colours = facts.colours(second)
        if question == _HOW_MANY:
            return NUMBERS[len(colours)]
        return colours.get(question.removeprefix(_COLOUR).rstrip("?"), "gone")

    texts, latest = {begin: sentence(answer(begin))}, answer(begin)
    for second in later:
        if answer(second) != latest:
            latest = answer(second)
            now = "now there are" if question == _HOW_MANY else "now it is"
            texts[second] = sentence(f"{now} {latest}")
    return texts


class Teacher:
    """Replies to the requests of data_pipeline/synthesis/prompts.yaml.

    stories: of the clips. pictures: the story and second of each picture that may be shown.
    wrong: share of replies in which a caption, a time, an answer or a verdict is wrong.
    """

    def __init__(
        self,
        stories: Sequence[Story],
        pictures: Mapping[str, tuple[int, int]],
        wrong: float,
        seed: int = 0,
    ) -> None:
        self._stories, self.pictures, self._wrong, self._seed = stories, pictures, wrong, seed

    def reply(self, kind: str, data: dict[str, Any], urls: Sequence[str], vote: str) -> Any:
        """The reply to a request, always the same for the same request and vote. KeyError: a
        picture is unknown."""
        frames = [self.pictures[picture] for picture in urls]
        # The data last: a difference in them alone must make another draw.
        draws = random.Random(f"{self._seed}/{kind}/{vote}/{frames}/{sorted(data.items())}")
        wrong = draws.random() < self._wrong
        if kind == "write":
            return {"samples": _written(data, draws, wrong)}
        if kind == "audit":
            expected = spoken(of_timeline(data), data["questions"], data["seconds"])
            right = {answer["second"]: answer["text"] for answer in data["answers"]} == expected
            return _verdict("right", right != wrong)
        if kind == "same":
            a, b = (text.lower().strip(" .") for text in data["answers"])
            return {"same": (a == b) != wrong}
        story, last = self._stories[frames[-1][0]], frames[-1][1]
        if kind == "say":
            facts = of_story(story, last - data["now"])
            expected = spoken(facts, data["questions"], data["now"] + 1)
            text = expected.get(data["now"], "")
            text = _misheard(text, draws) if wrong else text
            return {"speak": bool(text), "text": text}
        truth = _caption(story, data["seconds"], last)
        if kind == "caption":
            return _miscaptioned(truth, data["seconds"], draws) if wrong else truth
        claimed = {name: data[name] for name in truth}
        return _verdict("right", (claimed == truth) != wrong)


def _verdict(name: str, yes: bool) -> dict[str, Any]:
    return {"why": "" if yes else "Something is wrong.", name: yes}


def _caption(story: Story, seconds: list[int], last: int) -> dict[str, Any]:
    """The true caption of a window whose last second is `last` of the story."""
    shift = seconds[-1] - last  # from seconds of the story to those of the clip
    events = [{"second": event.second + shift, "text": tell(event)}
              for event in story.events if event.second + shift in seconds
              and event.second + shift > 0]  # fmt: skip
    return {"scene": describe(story.states[seconds[0] - shift]), "events": events}


def _miscaptioned(
    truth: dict[str, Any], seconds: list[int], draws: random.Random
) -> dict[str, Any]:
    """A wrong caption: another scene, or an event that is invented, left out, changed, or at
    another time."""
    events = [dict(event) for event in truth["events"]]
    how = draws.choice(["scene", "invented"] + ["left out", "another", "time"] * bool(events))
    if how == "scene":
        return truth | {"scene": _changed(truth["scene"], draws)}
    if how == "invented":
        events.append({"second": draws.choice(seconds), "text": _event(draws)})
    elif how == "left out":
        events.pop(draws.randrange(len(events)))
    else:
        event = draws.choice(events)
        others = [second for second in seconds if second != event["second"]]
        if how == "time" and others:
            event["second"] = draws.choice(others)
        else:
            event["text"] = _changed(event["text"], draws)
    return {"scene": truth["scene"], "events": sorted(events, key=lambda one: one["second"])}


def _event(draws: random.Random) -> str:
    who = f"{draws.choice([*COLOURS])} {draws.choice(SHAPES)}"
    return tell(Event(0, "move", who, draws.choice([*DIRECTIONS])))


def _misheard(text: str, draws: random.Random) -> str:
    """A wrong reply: silence or another text in place of a text, a text in place of silence."""
    if not text:
        return _event(draws)
    return draws.choice(["", _changed(text, draws)])


_SETS = ([*COLOURS], [*SHAPES], [*DIRECTIONS], [*NUMBERS[1:6]], ["yes", "no"], ["gone", "red"])


def _changed(text: str, draws: random.Random) -> str:
    """The text with another colour, shape, direction or number, or yes for no."""
    words = re.findall(r"\w+|\W+", text)
    places = [(i, names) for i, word in enumerate(words) for names in _SETS
              if word.lower() in names]  # fmt: skip
    if not places:
        return _event(draws)
    place, names = draws.choice(places)
    other = draws.choice([name for name in names if name != words[place].lower()])
    words[place] = other.capitalize() if words[place][0].isupper() else other
    return "".join(words)


def _written(data: dict[str, Any], draws: random.Random, wrong: bool) -> list[dict[str, Any]]:
    """Conversations of a role about a timeline; fewer than asked for where it has no more."""
    facts, seconds = of_timeline(data), data["seconds"]
    candidates = _questions(data["role"], facts, seconds, draws)
    made = []
    for questions in draws.sample(candidates, min(data["number"], len(candidates))):
        texts = spoken(facts, questions, seconds)
        answers = [{"second": second, "text": text} for second, text in sorted(texts.items())]
        sample = {"questions": questions, "answers": answers}
        made.append(_spoiled(sample, facts, draws) if wrong else sample)
    return made


def _questions(role: str, facts: Facts, seconds: int, draws: random.Random) -> list[list[TextAt]]:
    """The questions of a role that fit the timeline."""
    kinds = {verb: [e.second for e in facts.events if e.kind == kind]
             for verb, kind in _KINDS.items()}  # fmt: skip
    happened = {verb: times for verb, times in kinds.items() if times}
    if role == "fire_once":
        late = [event for event in facts.events if event.second > 1]
        return [[_text_at(_when(e), draws.randrange(e.second - 1, e.second))] for e in late]
    if role == "resident":
        return [[_text_at(f"{_WHENEVER}{verb}.", draws.randrange(times[0]))]
                for verb, times in happened.items()]  # fmt: skip
    if role == "counting":
        return [[_text_at(f"{_COUNT}{verb}.", 0)] for verb in happened]
    if role == "commentary":
        return [[_text_at(NARRATE, 0)]]
    if role == "interruption":
        newer = _text_at(f"{_THERE}{draws.choice(SHAPES)}?", draws.randrange(1, seconds - 1))
        return [[_text_at(NARRATE, 0), newer]]
    if role == "self_correction":
        found = [_text_at(f"{_COLOUR}{e.shape}?", draws.randrange(e.second)) for e in facts.events
                 if e.kind == "turn"]  # fmt: skip
        found += [_text_at(_HOW_MANY, draws.randrange(e.second)) for e in facts.events
                  if e.kind in ("come", "leave")]  # fmt: skip
        return [[one] for one in found if _has_answer(facts, one)]
    return [[_text_at(text, 0)] for text in _absent(facts)]


def _has_answer(facts: Facts, question: TextAt) -> bool:
    """Whether the shape whose colour is asked for is there."""
    shape = question["text"].removeprefix(_COLOUR).rstrip("?")
    return question["text"] == _HOW_MANY or shape in facts.colours(question["second"])


def _absent(facts: Facts) -> list[str]:
    """Moves of shapes of the first scene that do not happen."""
    happened = {tell(event) for event in facts.events}
    things = [f"{colour} {shape}" for colour, shape in _NAME.findall(facts.scene)]
    moves = [Event(0, "move", who, to) for who in things for to in DIRECTIONS]
    return [_when(event) for event in moves if tell(event) not in happened]


def _text_at(text: str, second: int) -> TextAt:
    return {"second": second, "text": text}


def _when(event: Event) -> str:
    description = tell(event)
    return f"{_WHEN}{description[0].lower()}{description[1:]}"


def _spoiled(sample: dict[str, Any], facts: Facts, draws: random.Random) -> dict[str, Any]:
    """A wrong sample: an answer at another time, another answer, one answer too few, or a time in a
    text."""
    answers = [dict(answer) for answer in sample["answers"]]
    if not answers:  # asks for what happens, and says nothing
        if not facts.events:
            return sample
        event = facts.events[-1]
        return {"questions": [_text_at(_when(event), 0)], "answers": []}
    answer = draws.choice(answers)
    how = draws.choice(("time", "time", "text", "text", "left out", "leak"))
    if how == "time":
        answer["second"] = max(0, answer["second"] + draws.choice((-2, -1, 1, 2)))
    elif how == "text":
        answer["text"] = _changed(answer["text"], draws)
    elif how == "left out":
        answers.remove(answer)
    else:
        answer["text"] = f"At second {answer['second']}: {answer['text']}"
    return {"questions": sample["questions"], "answers": answers}
