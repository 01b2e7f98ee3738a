"""Scores of one kind of item each: captions, questions, real-time streams.

Every number is between 0 and 1 unless its name gives a unit. `count`: of how many items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL
from data_pipeline.schema import MARK
from moss_train.evaluate.generate import answer_start, answers, predictions, streams
from moss_train.evaluate.items import Item
from moss_train.evaluate.model import TrainedModel

EXACT = "answers exact"
IN_TIME = 1  # seconds from an event's frame to the sentence about it


@dataclass
class Score:
    """One number of one source: of the model, without its frames (`blind`), and of chance."""

    source: str
    metric: str
    value: float
    blind: float | None
    chance: float | None
    count: int


@dataclass
class Answered:
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


def caption_scores(model: TrainedModel, items: Sequence[Item]) -> list[Score]:
    """Teacher-forced token accuracy of captions; chance predicts the most frequent token always."""
    labels = torch.cat(
        [item.encoded.labels[item.encoded.labels != IGNORED_LABEL] for item in items]
    )
    frequent = labels.bincount().max().item() / len(labels)
    value, blind = (_token_accuracy(model, items, blind) for blind in (False, True))
    return [Score(items[0].source, "caption token accuracy", value, blind, frequent, len(items))]


def _token_accuracy(model: TrainedModel, items: Sequence[Item], blind: bool) -> float:
    hits = total = 0
    for item, (likely, _) in zip(items, predictions(model, items, blind), strict=True):
        labels, said = item.encoded.labels[1:], likely[:-1]
        loss_positions = labels != IGNORED_LABEL
        hits += int((said == labels)[loss_positions].sum())
        total += int(loss_positions.sum())
    return hits / total


def question_scores(
    model: TrainedModel, items: Sequence[Item]
) -> tuple[list[Score], list[Answered]]:
    """Exact answers to questions, of each task and all, and the answers; chance draws from the
    options.

    Items with options are also scored as multiple choice: the likeliest option.
    """
    said, unseen = (answers(model, items, blind=blind) for blind in (False, True))
    right, blind = (_exact(found, items) for found in (said, unseen))
    scores = [_mean(items, right, blind, items[0].source, EXACT)]
    for task in sorted({item.task for item in items}):
        chosen = [i for i, item in enumerate(items) if item.task == task]
        scores.append(
            _mean(
                [items[i] for i in chosen],
                [right[i] for i in chosen],
                [blind[i] for i in chosen],
                items[0].source,
                f"  {task}",
            )
        )
    closed = [item for item in items if item.options]
    if closed:
        picked, guessed = (_choose(model, closed, blind) for blind in (False, True))
        scores.append(_mean(closed, picked, guessed, items[0].source, "multiple choice"))
    answered = [
        Answered(item.encoded.key, MARK.sub("", item.sample.messages[-2].content), item.answer, own)
        for item, own in zip(items, said, strict=True)
    ]
    return scores, answered


def questions_together(scores: Sequence[Score]) -> list[Score]:
    """One score of the exact answers of all sources; none where only one asks."""
    parts = [score for score in scores if score.metric == EXACT]
    if len(parts) < 2:
        return []
    count = sum(part.count for part in parts)
    value, blind, chance = (
        sum((getattr(part, name) or 0.0) * part.count for part in parts) / count
        for name in ("value", "blind", "chance")
    )
    return [Score("all sources", EXACT, value, blind, chance, count)]


def _mean(
    items: Sequence[Item],
    right: Sequence[bool],
    blind: Sequence[bool],
    source: str,
    metric: str,
) -> Score:
    count = len(items)
    chance = sum(1 / len(item.options) for item in items if item.options) / count
    return Score(source, metric, sum(right) / count, sum(blind) / count, chance, count)


def _exact(said: Sequence[str], items: Sequence[Item]) -> list[bool]:
    return [plain(text) == plain(item.answer) for text, item in zip(said, items, strict=True)]


def plain(text: str) -> str:
    """An answer as it is compared: case, spaces at its ends and a final stop do not count."""
    return " ".join(text.lower().split()).rstrip(".")


def _choose(model: TrainedModel, items: Sequence[Item], blind: bool) -> list[bool]:
    """Is the likeliest option, by the mean log probability of its tokens, the answer?"""
    asked = [_with_answer(model, item, option) for item in items for option in item.options]
    sums = [
        float(chances[answer_start(item) :].mean())
        for item, (_, chances) in zip(asked, predictions(model, asked, blind), strict=True)
    ]
    right, start = [], 0
    for item in items:
        own = sums[start : start + len(item.options)]
        start += len(item.options)
        best = item.options[own.index(max(own))]
        right.append(plain(best) == plain(item.answer))
    return right


def _with_answer(model: TrainedModel, item: Item, option: str) -> Item:
    """The item with another answer, and the same end of turn."""
    start, encoded = answer_start(item), item.encoded
    said = model.tokenizer.encode(option, add_special_tokens=False).ids
    answer = torch.tensor([*said, int(encoded.tokens[-1])])
    ignored = torch.full((start,), IGNORED_LABEL)
    return replace(
        item,
        encoded=replace(
            encoded,
            tokens=torch.cat([encoded.tokens[:start], answer]),
            labels=torch.cat([ignored, answer]),
        ),
    )


def decision_scores(model: TrainedModel, items: Sequence[Item]) -> list[Score]:
    """The decision after each frame, to speak or not, teacher-forced: F1 of speaking.

    Chance speaks after as many frames as the data do, at random.
    """
    truth = torch.cat([decisions(model, item, item.encoded.labels[1:]) for item in items])
    source, share = items[0].source, truth.float().mean().item()
    f1 = []
    for blind in (False, True):
        likely = [said for said, _ in predictions(model, items, blind)]
        spoken = torch.cat(
            [decisions(model, item, said[:-1]) for item, said in zip(items, likely, strict=True)]
        )
        f1.append(_f1(spoken, truth))
    return [Score(source, "decision F1", f1[0], f1[1], share, len(truth))]


def decisions(model: TrainedModel, item: Item, following: Tensor) -> Tensor:
    """True where a token of `following` `[S - 1]` after a frame of the model's turn is speech."""
    frames = item.encoded.frame_positions
    frames = frames[frames < len(item.encoded.tokens) - 1]
    loss_positions = frames[item.encoded.labels[frames + 1] != IGNORED_LABEL]
    return following[loss_positions] != model.encoder.special.silence


def _f1(spoken: Tensor, truth: Tensor) -> float:
    both = int((spoken & truth).sum())
    wrong = int((spoken ^ truth).sum())
    return 2 * both / (2 * both + wrong) if both or wrong else 1.0


def live_scores(model: TrainedModel, items: Sequence[Item]) -> tuple[list[Score], list[Timeline]]:
    """Streams played live: events reported in time, answers, false alarms."""
    played = [_timelines(items, streams(model, items, blind=blind)) for blind in (False, True)]
    counts = [_count(items, timelines) for timelines in played]
    source = items[0].source
    rows = [
        ("events spoken within 1 s", "in_time", "events"),
        ("  with the right words", "right", "events"),
        ("answers mid-stream", "answered", "questions"),
        ("false alarms a minute", "false", "minutes"),
    ]
    scores = []
    for metric, hits, total in rows:
        value, blind = (count[hits] / max(count[total], 1e-9) for count in counts)
        if counts[0][total]:
            scores.append(Score(source, metric, value, blind, None, int(counts[0][total])))
    return scores, played[0]


def _timelines(items: Sequence[Item], spoken: Sequence[list[tuple[int, str]]]) -> list[Timeline]:
    return [
        Timeline(item.encoded.key, len(item.encoded.frames), list(item.speech), said)
        for item, said in zip(items, spoken, strict=True)
    ]


def _count(items: Sequence[Item], timelines: Sequence[Timeline]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for item, timeline in zip(items, timelines, strict=True):
        said = list(timeline.spoken)
        if item.options:  # asked in the middle: the first thing said after that is the answer
            counts["questions"] += 1
            asked = asked_second(item)
            answer = next((u for u in said if u[0] == asked), None)
            if answer is not None:
                said.remove(answer)
                expected = item.answer.partition("<|")[0]
                counts["answered"] += plain(answer[1]) == plain(expected)
        for second, wanted in timeline.wanted:
            counts["events"] += 1
            near = [u for u in said if 0 <= u[0] - second <= IN_TIME]
            match = next((u for u in near if u[1] == wanted), near[0] if near else None)
            if match is not None:
                said.remove(match)
                counts["in_time"] += 1
                counts["right"] += match[1] == wanted
        counts["false"] += len(said)
        counts["seconds"] += timeline.seconds
    return counts | Counter({"minutes": counts["seconds"] / 60})  # type: ignore[dict-item]


def asked_second(item: Item) -> int:
    """The second of the last frame before the question."""
    return sum(message.content.count("<|video|>") for message in item.sample.messages[:-1]) - 1
