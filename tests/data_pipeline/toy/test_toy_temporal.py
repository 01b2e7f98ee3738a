"""Questions that need time: a whole clip answers them; its frames in any order, or one, do not.

The best guess from something that is known is the answer that goes with it most often. It is
learned from half of many clips and tried on the other half, so that no luck is counted.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from itertools import pairwise

import pytest

from data_pipeline.toy.captions import QA
from data_pipeline.toy.temporal import TASKS, Clip, draw
from data_pipeline.toy.world import State
from tests.data_pipeline.toy.truth import seen

SHAPES = ("circle", "square", "triangle", "cross")
CLIPS = [draw(random.Random(seed)) for seed in range(10_000)]
CHANCE = {"before": 1 / 2, "first": 1 / 2, "direction": 1 / 2, "repeats": 1 / 3, "duration": 1 / 2}


def task_of(qa: QA) -> str:
    group, _, task = qa.task.partition("/")
    assert group == "time"
    return task


def conclusion(qa: QA) -> str:
    """The answer's last sentence."""
    return qa.answer.split(". ")[-1]


def expected(qa: QA, states: tuple[State, ...]) -> list[str]:
    """What is seen in each second, and the answer, found in the states."""
    words = qa.question.rstrip("?").replace(",", "").split()
    now = [seen(state) for state in states]
    task = task_of(qa)
    if task == "first":
        named = words[5], words[8]
        shown = [next(shape for shape in named if shape in state) for state in now]
        return [*shown, shown[0]]
    looks = [state[words[{"repeats": 4, "duration": 5}.get(task, 4)]] for state in now]
    colours, places = [colour for colour, _ in looks], [place.split() for _, place in looks]
    if task == "direction":
        part = 0 if places[0][0] != places[-1][0] else 1
        sides = [place[part] for place in places]
        return [*sides, {"top": "up", "bottom": "down"}.get(sides[-1], sides[-1])]
    if task == "before":
        other = {colours[0], colours[-1]}
        assert other == {words[-3], words[-1]}
        return [*colours, colours[0 if "before" in words else -1]]
    if task == "repeats":
        changes = sum(a != b for a, b in pairwise(colours))
        return [*colours, ("none", "one", "two", "three")[changes]]
    kept = next(n for n, colour in enumerate(colours) if colour != colours[0])
    return [*colours, ("none", "one", "two")[kept]]


def test_the_whole_clip_tells_the_answer() -> None:
    for clip in CLIPS[:2000]:
        assert len(clip.story.states) == 4
        for state in clip.story.states:
            for part in ("place", "shape", "colour"):
                assert len({getattr(thing, part) for thing in state}) == len(state)
        for qa in clip.questions:
            *shown, answer = expected(qa, clip.story.states)
            told = f"{', '.join(shown).capitalize()}. {answer.capitalize()}."
            assert qa.answer == told
            assert conclusion(qa) in qa.options
            assert qa.answer not in qa.options


def test_every_task_is_asked_as_often_and_no_two_questions_are_about_one_thing() -> None:
    counts = Counter(task_of(clip.questions[0]) for clip in CLIPS)
    assert counts.keys() == {*TASKS} == CHANCE.keys()
    assert min(counts.values()) > 0.19 * len(CLIPS)
    two = [clip for clip in CLIPS if len(clip.questions) == 2]
    assert 0.48 < len(two) / len(CLIPS) < 0.52
    for clip in two:
        first, second = ({w for w in qa.question.split()} & set(SHAPES) for qa in clip.questions)
        assert not first & second


def named(clip: Clip, number: int) -> Callable[[State], str]:
    """Reads a state in names that do not hang on the clip: the thing that question `number` is
    about and the other one, their colours in alphabetic order, and their places.

    Without this there would be more kinds of clips than clips.
    """
    states = [seen(state) for state in clip.story.states]
    words = clip.questions[number].question.replace("?", "").replace(",", "").split()
    subjects = [shape for shape in SHAPES if shape in words]  # two of `first`
    palettes = [
        sorted({look[0] for state in states for shape, look in state.items() if mine(shape)})
        for mine in (subjects.__contains__, lambda shape: shape not in subjects)
    ]

    def read(state: State) -> str:
        return str(sorted(
            (subjects.index(shape) if shape in subjects else -1,
             palettes[shape not in subjects].index(colour), place)
            for shape, (colour, place) in seen(state).items()
        ))  # fmt: skip

    return read


def about(clip: Clip, number: int) -> tuple[Hashable, ...]:
    """A question in the same names: its task, its words beside shapes, its options' order."""
    qa = clip.questions[number]
    words = qa.question.rstrip("?").replace(",", "").split()
    shapes = [shape for shape in SHAPES if shape in words]
    colours = sorted({"red", "green", "blue", "yellow"} & {*words})
    said = [
        shapes.index(w) if w in shapes else colours.index(w) if w in colours else w for w in words
    ]
    return (task_of(qa), *said)


def answer_of(clip: Clip, number: int) -> str:
    """The answer in the same names."""
    qa, answer = clip.questions[number], conclusion(clip.questions[number]).rstrip(".").lower()
    words = qa.question.rstrip("?").replace(",", "").split()
    for palette in (SHAPES, ("blue", "green", "red", "yellow")):
        if answer in palette:
            return str([name for name in palette if name in words].index(answer))
    return answer


Known = Callable[[Clip, int], Hashable]
WAYS: dict[str, Known] = {
    "the question": lambda clip, n: (),
    "all frames in any order": lambda clip, n: tuple(
        sorted(map(named(clip, n), clip.story.states))
    ),
    "the frame in the middle": lambda clip, n: named(clip, n)(clip.story.states[2]),
    "one frame, wherever it is": lambda clip, n: named(clip, n)(
        random.Random(str(clip.story.states)).choice(clip.story.states)
    ),
}


def best_guess(know: Known, number: int) -> dict[str, tuple[float, int]]:
    """For each task the share of right guesses, of so many; what was never seen is guessed at
    random."""
    half = len(CLIPS) // 2
    counts: defaultdict[Hashable, Counter[str]] = defaultdict(Counter)
    right, tried = defaultdict[str, float](float), Counter[str]()
    for clip in CLIPS[:half]:
        if number < len(clip.questions):
            counts[about(clip, number), know(clip, number)][answer_of(clip, number)] += 1
    for clip in CLIPS[half:]:
        if number < len(clip.questions):
            likely = counts[about(clip, number), know(clip, number)].most_common(1)
            task = task_of(clip.questions[number])
            tried[task] += 1
            right[task] += likely[0][0] == answer_of(clip, number) if likely else CHANCE[task]
    return {task: (right[task] / tried[task], tried[task]) for task in tried}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [0, 1])
def test_without_the_order_no_guess_is_better_than_chance(way: str, number: int) -> None:
    """Within four standard deviations of chance."""
    for task, (share, count) in best_guess(WAYS[way], number).items():
        error = (CHANCE[task] * (1 - CHANCE[task]) / count) ** 0.5
        assert abs(share - CHANCE[task]) < 4 * error, (task, share, count)


def test_the_order_of_the_frames_is_enough_for_a_guess() -> None:
    """The same table, of frames in their order, knows the answers: it could have found a leak."""

    def in_order(clip: Clip, number: int) -> Hashable:
        return tuple(map(named(clip, number), clip.story.states))

    for task, (share, _) in best_guess(in_order, 0).items():
        assert share > 0.7, task
