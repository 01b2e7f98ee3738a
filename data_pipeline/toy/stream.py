"""Writes real-time conversations about the toy world: a frame each second, then words or silence.

At most `WORDS` words follow a frame; a longer sentence goes on after the next frame. A second in
which a sentence ends, or without a word, ends with `<|silence|>`. The next frame may come at any
time after a question: half of the questions are answered before it, a quarter after it, and in a
quarter it comes in the middle of the answer.
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
WORDS = 5  # words a second at most
_TRIES = 3  # to find a question whose answer changes later; else one is taken that stays right


@dataclass(frozen=True)
class Stream:
    """A real-time conversation."""

    messages: list[dict[str, str]]
    speech: dict[int, str]  # the sentence that starts in a second; without the answer to `qa`
    qa: QA | None = None


def narration(story: Story) -> Stream:
    """A conversation in which the model describes the first state and every event."""
    speech = {event.second: tell(event) for event in story.events}
    speech[0] = describe(story.states[0])
    content = _watch(speech, range(len(story.states)))
    return Stream([_user(NARRATE), _assistant(content)], dict(sorted(speech.items())))


def question(story: Story, rng: random.Random) -> Stream:
    """A conversation with a question in the middle; the model answers, and says each time that
    the answer changes."""
    second = rng.randrange(1, len(story.states) // 2)  # of the last frame before the answer
    for _ in range(_TRIES):
        qa = question_at(story.states[second], rng)
        speech = _corrections(story, second, qa)
        if speech:
            break
    # Whether the next frame comes before, within or after the answer.
    next_frame = rng.choice(("after", "after", "before", "within"))
    before = second if next_frame == "before" else second + 1  # frames before the question
    first, rest = _cut(qa.answer, next_frame, rng)
    messages = [
        _user(""),
        _assistant(_watch({}, range(before))),
        _user(qa.question),
        _assistant(first + _watch(speech, range(before, len(story.states)), rest)),
    ]
    return Stream(messages, speech, qa)


def _cut(answer: str, next_frame: str, rng: random.Random) -> tuple[str, str]:
    """The parts of the answer before and after the next frame; the second without its silence."""
    if next_frame == "after":
        return answer + SILENCE, ""
    if next_frame == "before":
        return "", answer
    parts = re.findall(r" ?\w+|[^\w ]", answer)
    cut = rng.randrange(1, len(parts))
    return "".join(parts[:cut]), "".join(parts[cut:])


def question_at(state: State, rng: random.Random) -> QA:
    """A question about the colour or place of one of the shapes, or about their number."""
    ask = rng.choice((colour, place, None))
    return ask(rng.choice(state)) if ask else count(state)


def _corrections(story: Story, start: int, qa: QA) -> dict[int, str]:
    """The sentence for each second after `start` in which the answer to a question changes."""
    subject = qa.question.rstrip("?").split()[-1]  # the shape, for colour and place
    speech, latest = {}, _fact(story.states[start], qa.task, subject)
    for second in range(start + 1, len(story.states)):
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
    """The model's turn: frames, each followed by the words of its second. `answer` (all of an
    answer, or its rest) follows the first one."""
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
