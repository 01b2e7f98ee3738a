"""What a model makes of samples, each with its frames and with controls in place of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from data_pipeline.batch import IGNORED_LABEL
from moss_train.evaluate.controls import ALL_FRAMES, BLIND, Model, ShownSample, watch
from moss_train.evaluate.generate import answer_start, answers, predictions, streams
from moss_train.evaluate.items import AnswerKey, Item

T = TypeVar("T")


@dataclass
class Outcome:
    """What came of one sample. Dictionaries have a value for ALL_FRAMES, and one for each control.

    frames: that the sample has.
    labels, hits: of a caption: its tokens; how many of them were the likeliest, teacher-forced.
    answers: to a question. picked: is the likeliest of its options the right one? Only
        where the whole answer is one of them.
    speaks, decided: of a stream: where it speaks after a frame of the model's turns, and where the
        model would, teacher-forced.
    spoken: of a stream, live: second and sentence.
    """

    answer_key: AnswerKey
    frames: int
    labels: list[int] = field(default_factory=list)
    hits: dict[str, int] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    picked: dict[str, bool] = field(default_factory=dict)
    speaks: list[bool] = field(default_factory=list)
    decided: dict[str, list[bool]] = field(default_factory=dict)
    spoken: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def outcomes(
    model: Model, items: Sequence[Item], controls: Sequence[str] = (BLIND,), generates: bool = True
) -> list[Outcome]:
    """What comes of each item, in their order. Frames are encoded once.

    generates: also what needs generation: answers in the model's words, and streams live.
    """
    watched = watch(model, items)
    found = [Outcome(item.answer_key(), len(item.encoded.frames)) for item in items]
    kinds = {"caption": _captions, "chat": _questions, "realtime": _streams}
    for kind, measure in kinds.items():
        chosen = [n for n, item in enumerate(items) if item.sample.kind == kind]
        if chosen:
            own = [found[n] for n in chosen]
            measure(model, [watched[n] for n in chosen], own, controls, generates)
    return found


Work = Callable[[list[ShownSample]], Sequence[T]]


def _under(
    watched: Sequence[ShownSample], controls: Sequence[str], work: Work[T]
) -> list[dict[str, T]]:
    """Runs `work` on the samples as they are and under each control. What a control does not
    change is not computed again. Returns `{ALL_FRAMES: ..., control: ...}` for each sample."""
    found = [{ALL_FRAMES: one} for one in work([*watched])]
    for control in controls:
        controlled = [sample.under(control) for sample in watched]
        changed = [
            n
            for n, (new, old) in enumerate(zip(controlled, watched, strict=True))
            if new is not old
        ]
        for own in found:
            own[control] = own[ALL_FRAMES]
        if changed:
            for n, one in zip(changed, work([controlled[n] for n in changed]), strict=True):
                found[n][control] = one
    return found


def _captions(
    model: Model,
    watched: Sequence[ShownSample],
    found: Sequence[Outcome],
    controls: Sequence[str],
    generates: bool,
) -> None:
    def hits(samples: list[ShownSample]) -> list[int]:
        counts = []
        for sample, (likely, _) in zip(samples, predictions(model, samples), strict=True):
            labels = sample.item.encoded.labels[1:]
            counts.append(int((likely[:-1] == labels)[labels != IGNORED_LABEL].sum()))
        return counts

    for sample, own, under in zip(watched, found, _under(watched, controls, hits), strict=True):
        labels = sample.item.encoded.labels[1:]
        own.labels, own.hits = labels[labels != IGNORED_LABEL].tolist(), under


def _questions(
    model: Model,
    watched: Sequence[ShownSample],
    found: Sequence[Outcome],
    controls: Sequence[str],
    generates: bool,
) -> None:
    if generates:
        replies = _under(watched, controls, lambda samples: answers(model, samples))
        for own, texts in zip(found, replies, strict=True):
            own.answers = texts
    closed = [n for n, sample in enumerate(watched) if _is_option(sample.item)]
    if closed:
        picked = _under(
            [watched[n] for n in closed], controls, lambda samples: _pick(model, samples)
        )
        for n, right in zip(closed, picked, strict=True):
            found[n].picked = right


def _pick(model: Model, watched: Sequence[ShownSample]) -> list[bool]:
    """Is the likeliest option, by the mean log probability of its tokens, the answer?"""
    candidates = [
        _with_answer(model, sample, option) for sample in watched for option in sample.item.options
    ]
    means = [
        float(chances[answer_start(sample.item) :].mean())
        for sample, (_, chances) in zip(candidates, predictions(model, candidates), strict=True)
    ]
    right, start = [], 0
    for sample in watched:
        own = means[start : start + len(sample.item.options)]
        start += len(own)
        best = sample.item.options[own.index(max(own))]
        right.append(plain(best) == plain(sample.item.answer))
    return right


def _with_answer(model: Model, sample: ShownSample, option: str) -> ShownSample:
    """The sample with another answer, and the same end of turn."""
    start, encoded = answer_start(sample.item), sample.item.encoded
    tokens = model.tokenizer.encode(option, add_special_tokens=False).ids
    answer = torch.tensor([*tokens, int(encoded.tokens[-1])])
    ignored = torch.full((start,), IGNORED_LABEL)
    other = replace(
        encoded,
        tokens=torch.cat([encoded.tokens[:start], answer]),
        labels=torch.cat([ignored, answer]),
    )
    return replace(sample, item=replace(sample.item, encode=lambda: other))


def _streams(
    model: Model,
    watched: Sequence[ShownSample],
    found: Sequence[Outcome],
    controls: Sequence[str],
    generates: bool,
) -> None:
    def decide(samples: list[ShownSample]) -> list[list[bool]]:
        likely = [sentences for sentences, _ in predictions(model, samples)]
        return [
            decisions(model, sample.item, sentences[:-1]).tolist()
            for sample, sentences in zip(samples, likely, strict=True)
        ]

    decided = _under(watched, controls, decide)
    for sample, own, under in zip(watched, found, decided, strict=True):
        own.speaks = decisions(model, sample.item, sample.item.encoded.labels[1:]).tolist()
        own.decided = under
    if generates:
        spoken = _under(watched, controls, lambda samples: streams(model, samples))
        for own, sentences in zip(found, spoken, strict=True):
            own.spoken = sentences


def decisions(model: Model, item: Item, following: Tensor) -> Tensor:
    """True where a token of `following` `[S - 1]` after a frame of the model's turn is speech."""
    frames = item.encoded.frame_positions
    frames = frames[frames < len(item.encoded.tokens) - 1]
    loss_positions = frames[item.encoded.labels[frames + 1] != IGNORED_LABEL]
    return following[loss_positions] != model.encoder.special.silence


def plain(text: str) -> str:
    """An answer as it is compared: case, spaces at its ends and a final stop do not count."""
    return " ".join(text.lower().split()).rstrip(".")


def is_right(key: AnswerKey, reply: str) -> bool:
    """Is a reply to a question right?

    An answer that leads to one of the options and is more than it (`Red, blue. Red.`) is compared
    by its last sentence, any other as a whole.
    """
    if key.options and not _is_option(key):
        return last_sentence(reply) == last_sentence(key.answer)
    return plain(reply) == plain(key.answer)


def _is_option(key: AnswerKey) -> bool:
    return plain(key.answer) in map(plain, key.options)


def last_sentence(text: str) -> str:
    """The last sentence, as it is compared."""
    return plain(text).rpartition(". ")[2]
