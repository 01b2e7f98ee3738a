"""Scores of one kind of samples each: captions, questions, real-time streams.

Every number is between 0 and 1 unless its name gives a unit. `count`: of how many items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_pipeline.schema import MARK, VIDEO_MARK
from moss_train.evaluate.controls import ALL_FRAMES, BLIND, ONE_FRAME, SHUFFLED
from moss_train.evaluate.items import AnswerKey
from moss_train.evaluate.outcomes import Outcome, is_right, plain

EXACT = "answers exact"
IN_TIME = 1  # seconds from an event's frame to the sentence about it


@dataclass
class Score:
    """One number of one source, for the model, for chance, and for the model under each control
    (controls.py).

    None: not asked for; of `one_frame` and `shuffled` also where no sample has two frames.
    """

    source: str
    metric: str
    value: float
    blind: float | None
    chance: float | None
    count: int
    one_frame: float | None = None
    shuffled: float | None = None


def _score(
    found: Sequence[Outcome],
    metric: str,
    name: str,
    value: Callable[[str], float],
    chance: float | None,
    count: int,
) -> Score:
    """`value` of all outcomes with each of the controls that their field `name` has."""
    moves = any(own.frames > 1 for own in found)
    under = {
        control: value(control)
        for control in getattr(found[0], name)
        if moves or control in (ALL_FRAMES, BLIND)
    }
    return Score(
        found[0].answer_key.source,
        metric,
        under[ALL_FRAMES],
        under.get(BLIND),
        chance,
        count,
        under.get(ONE_FRAME),
        under.get(SHUFFLED),
    )


@dataclass
class AnsweredQuestion:
    """A question of a sample: the right answer, and what the model said."""

    key: str
    asked: str
    wanted: str
    said: str


@dataclass
class Timeline:
    """A stream second by second: what is to be said and what was, for plots and tables."""

    key: str
    seconds: int
    wanted: list[tuple[int, str]] = field(default_factory=list)
    spoken: list[tuple[int, str]] = field(default_factory=list)


def caption_scores(found: Sequence[Outcome]) -> list[Score]:
    """Teacher-forced token accuracy of captions; chance predicts the most frequent token always."""
    labels = Counter(label for own in found for label in own.labels)
    total = labels.total()
    frequent = labels.most_common(1)[0][1] / total

    def accuracy(control: str) -> float:
        return sum(own.hits[control] for own in found) / total

    return [_score(found, "caption token accuracy", "hits", accuracy, frequent, len(found))]


def question_scores(found: Sequence[Outcome]) -> tuple[list[Score], list[AnsweredQuestion]]:
    """Exact answers to questions, of each task and all, and the answers; chance draws from the
    options.

    Items whose answer is one of their options are also scored as multiple choice: the likeliest
    option. Without generation there is nothing else.
    """
    scores: list[Score] = []
    answered: list[AnsweredQuestion] = []
    if found[0].answers:
        scores.append(_exact(found, EXACT))
        for task in _tasks(found):
            chosen = [own for own in found if f"{own.answer_key.task}/".startswith(f"{task}/")]
            scores.append(_exact(chosen, f"  {task}"))
        answered = [
            AnsweredQuestion(
                own.answer_key.key,
                MARK.sub("", own.answer_key.sample.messages[-2].content),
                own.answer_key.answer,
                own.answers[ALL_FRAMES],
            )
            for own in found
        ]
    closed = [own for own in found if own.picked]
    if closed:

        def right(control: str) -> float:
            return sum(own.picked[control] for own in closed) / len(closed)

        scores.append(
            _score(closed, "multiple choice", "picked", right, _chance(closed), len(closed))
        )
    return scores, answered


def _tasks(found: Sequence[Outcome]) -> list[str]:
    """All tasks, and before those of a group (`time/first`) the group."""
    tasks = {own.answer_key.task for own in found}
    return sorted(tasks | {task.partition("/")[0] for task in tasks})


def _exact(found: Sequence[Outcome], metric: str) -> Score:
    def right(control: str) -> float:
        return sum(is_right(own.answer_key, own.answers[control]) for own in found) / len(found)

    return _score(found, metric, "answers", right, _chance(found), len(found))


def _chance(found: Sequence[Outcome]) -> float:
    return sum(1 / len(own.answer_key.options) for own in found if own.answer_key.options) / len(
        found
    )


def questions_together(scores: Sequence[Score]) -> list[Score]:
    """The score of the exact answers of all sources together; [] where fewer than two sources
    ask."""
    parts = [score for score in scores if score.metric == EXACT]
    if len(parts) < 2:
        return []
    count = sum(part.count for part in parts)

    def mean(name: str) -> float:
        # Where no sample has two frames, a control that moves them changes nothing.
        values = [(getattr(part, name), part) for part in parts]
        return sum((p.value if v is None else v) * p.count for v, p in values) / count

    chance = sum((part.chance or 0.0) * part.count for part in parts) / count
    under = {
        name: mean(name) if any(getattr(part, name) is not None for part in parts) else None
        for name in (BLIND, ONE_FRAME, SHUFFLED)
    }
    return [Score("all sources", EXACT, mean("value"), under.pop(BLIND), chance, count, **under)]


def decision_scores(found: Sequence[Outcome]) -> list[Score]:
    """The decision after each frame, to speak or not, teacher-forced: F1 of speaking.

    Chance speaks after as many frames as the data do, at random.
    """
    truth = [speaks for own in found for speaks in own.speaks]

    def f1(control: str) -> float:
        return _f1([decision for own in found for decision in own.decided[control]], truth)

    share = sum(truth) / len(truth)
    return [_score(found, "decision F1", "decided", f1, share, len(truth))]


def _f1(spoken: Sequence[bool], truth: Sequence[bool]) -> float:
    both = sum(speaks and right for speaks, right in zip(spoken, truth, strict=True))
    wrong = sum(speaks != right for speaks, right in zip(spoken, truth, strict=True))
    return 2 * both / (2 * both + wrong) if both or wrong else 1.0


def live_scores(found: Sequence[Outcome]) -> tuple[list[Score], list[Timeline]]:
    """Streams played live: events reported in time, answers, false alarms.

    `events F1` is that of sentences with the right words in time: twice their number over that of
    all sentences to be said and all that were said, answers aside.
    """
    counts = {
        control: _count([own.answer_key for own in found], _timelines(found, control))
        for control in found[0].spoken
    }
    rows = [
        ("events spoken within 1 s", "in_time", "events"),
        ("  with the right words", "right", "events"),
        ("events F1", "agreed", "told"),
        ("answers mid-stream", "answered", "questions"),
        ("false alarms a minute", "false", "minutes"),
    ]
    scores = []
    for metric, hits, of in rows:

        def share(control: str, hits: str = hits, of: str = of) -> float:
            return counts[control][hits] / max(counts[control][of], 1e-9)

        if total := counts[ALL_FRAMES][of]:
            scores.append(_score(found, metric, "spoken", share, None, int(total)))
    return scores, _timelines(found, ALL_FRAMES)


def _timelines(found: Sequence[Outcome], control: str) -> list[Timeline]:
    return [
        Timeline(own.answer_key.key, own.frames, list(own.answer_key.speech), own.spoken[control])
        for own in found
    ]


def _count(items: Sequence[AnswerKey], timelines: Sequence[Timeline]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for item, timeline in zip(items, timelines, strict=True):
        sentences = list(timeline.spoken)
        if item.options:  # asked in the middle: the first thing said after that is the answer
            counts["questions"] += 1
            answered_at, expected = expected_answer(item)
            answer = next((u for u in sentences if u[0] == answered_at), None)
            if answer is not None:
                sentences.remove(answer)
                counts["answered"] += plain(answer[1]) == plain(expected)
        counts["told"] += len(timeline.wanted) + len(sentences)
        for second, sentence in timeline.wanted:
            counts["events"] += 1
            near = [u for u in sentences if 0 <= u[0] - second <= IN_TIME]
            match = next((u for u in near if u[1] == sentence), near[0] if near else None)
            if match is not None:
                sentences.remove(match)
                counts["in_time"] += 1
                counts["right"] += match[1] == sentence
                counts["agreed"] += 2 * (match[1] == sentence)
        counts["false"] += len(sentences)
        counts["seconds"] += timeline.seconds
    return counts | Counter({"minutes": counts["seconds"] / 60})  # type: ignore[dict-item]


def expected_answer(item: AnswerKey) -> tuple[int, str]:
    """For a stream with a question: the second of the frame after which its answer begins, and the
    answer, without frames that come within it."""
    second = sum(message.content.count(VIDEO_MARK) for message in item.sample.messages[:-1]) - 1
    rest = item.answer
    while rest.startswith(VIDEO_MARK):
        second += 1
        rest = rest.removeprefix(VIDEO_MARK).removeprefix("<|silence|>")
    return second, rest.replace(VIDEO_MARK, "").partition("<|")[0]
