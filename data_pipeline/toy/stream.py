"""Real-time conversations about the toy world: one frame a second, words or silence after each.

After each frame come at most `WORDS` words; a longer sentence goes on after the next frame. A
second in which a sentence ends, or without a word, ends with `<|silence|>`. Whoever asks does not
wait for a frame to come or for the answer to end: half of the questions are answered before the
next frame, a quarter after it, and in a quarter it comes in the middle of the answer.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from data_pipeline.schema import VIDEO_MARK
from data_pipeline.toy.captions import (
    NUMBERS,
    QA,
    colour,
    count,
    describe,
    place,
    sentence,
    tell,
)
from data_pipeline.toy.world import PLACES, State, Story

SILENCE = "<|silence|>"
NARRATE = "Tell me what happens."
WORDS = 5  # a second
_TRIES = 3  # at a question whose answer changes later; if none is found, it does not change


@dataclass(frozen=True)
class Stream:
    """A conversation, and the sentences that start in each second, without the answer."""

    messages: list[dict[str, str]]
    speech: dict[int, str]
    qa: QA | None = None


def narration(story: Story) -> Stream:
    """A conversation in which the model describes the first state and every event."""
    speech = {event.second: tell(event) for event in story.events}
    speech[0] = describe(story.states[0])
    content = _watch(speech, range(len(story.states)))
    return Stream([_user(NARRATE), _assistant(content)], dict(sorted(speech.items())))


def question(story: Story, rng: random.Random) -> Stream:
    """A stream with a question in the middle; the model answers, and says when the answer
    changes."""
    asked = rng.randrange(1, len(story.states) // 2)  # second of the last frame that is asked about
    for _ in range(_TRIES):
        qa = question_at(story.states[asked], rng)
        speech = _corrections(story, asked, qa)
        if speech:
            break
    comes = rng.choice(("after", "after", "before", "within"))  # the next frame, to the answer
    before = asked if comes == "before" else asked + 1  # frames before the question
    first, rest = _cut(qa.answer, comes, rng)
    messages = [
        _user(""),
        _assistant(_watch({}, range(before))),
        _user(qa.question),
        _assistant(first + _watch(speech, range(before, len(story.states)), rest)),
    ]
    return Stream(messages, speech, qa)


def _cut(answer: str, comes: str, rng: random.Random) -> tuple[str, str]:
    """What is said before the next frame, and after it, without the silence of the latter."""
    if comes == "after":
        return answer + SILENCE, ""
    if comes == "before":
        return "", answer
    parts = re.findall(r" ?\w+|[^\w ]", answer)
    cut = rng.randrange(1, len(parts))
    return "".join(parts[:cut]), "".join(parts[cut:])


def question_at(state: State, rng: random.Random) -> QA:
    """About colour or place of one of the shapes, or their number."""
    ask = rng.choice((colour, place, None))
    return ask(rng.choice(state)) if ask else count(state)


def _corrections(story: Story, asked: int, qa: QA) -> dict[int, str]:
    subject = qa.question.rstrip("?").split()[-1]  # the shape, for colour and place
    speech, latest = {}, _fact(story.states[asked], qa.task, subject)
    for second in range(asked + 1, len(story.states)):
        fact = _fact(story.states[second], qa.task, subject)
        if fact != latest:
            speech[second], latest = fact, fact
    return speech


def _fact(state: State, task: str, subject: str) -> str:
    """The sentence that corrects an answer that has become wrong."""
    if task == "count":
        return sentence(f"now there are {NUMBERS[len(state)]}")
    thing = next((thing for thing in state if thing.shape == subject), None)
    if thing is None:
        return "Now it is gone."
    return sentence(f"now it is {thing.colour if task == 'colour' else PLACES[thing.place]}")


def _watch(speech: dict[int, str], seconds: range, answer: str = "") -> str:
    """Frames, each followed by the words of its second; `answer` (or its rest) by the first one."""
    content, waiting = "", []
    for second in seconds:
        content += VIDEO_MARK
        if second in speech:
            waiting += [speech[second].split()]
        if answer or not waiting:
            content += answer + SILENCE
            answer = ""
            continue
        words = waiting[0]
        begun = content.removesuffix(VIDEO_MARK)[-1:] not in (">", "")
        content += (" " if begun else "") + " ".join(words[:WORDS])
        del words[:WORDS]
        if not words:
            waiting.pop(0)
            content += SILENCE
    return content


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
