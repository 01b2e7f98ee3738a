"""All scores of a set of items, batch by batch, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.shards import ShardError
from data_pipeline.tables import format_table
from data_pipeline.toy.build import MODALITIES
from moss_train.evaluate.controls import BLIND, ONE_FRAME, SHUFFLED
from moss_train.evaluate.items import EvaluationError, Item, read_shards, sources_of
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.outcomes import Outcome, outcomes
from moss_train.evaluate.score import (
    AnsweredQuestion,
    Score,
    Timeline,
    caption_scores,
    decision_scores,
    live_scores,
    question_scores,
    questions_together,
)
from moss_train.evaluate.share import gather, share_out


@dataclass
class Evaluation:
    """Scores of a checkpoint, its answers, and its streams second by second."""

    checkpoint: str
    step: int
    scores: list[Score] = field(default_factory=list)
    samples: list[AnsweredQuestion] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # samples that cannot be used, each with why

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as written to JSON."""
        return asdict(self)

    def value(self, source: str, metric: str) -> float:
        """One score. KeyError where it was not measured."""
        for score in self.scores:
            if (score.source, score.metric.strip()) == (source, metric):
                return score.value
        raise KeyError(f"{source}: {metric}")


def evaluate(
    model: TrainedModel,
    items: Iterable[Item],
    on_progress: Callable[[str], None] = lambda _: None,
    controls: Sequence[str] = (BLIND,),
) -> Evaluation:
    """Scores all items, each by what it is, with the controls (data_config.CONTROLS) beside it. A
    collective of the model's ranks, all of which get the scores; their first one of each replica
    reads the items.

    on_progress: called with a line for each source, on the first rank. EvaluationError: none of the
    samples can be used.
    """
    left: list[str] = []
    found = share_out(
        model,
        items,
        lambda block: outcomes(model, block, controls),
        on_progress,
        lambda error: left.append(str(error)),
    )
    left = list(chain.from_iterable(gather(model.groups, left)))
    if left and not found:
        raise EvaluationError(f"none of {len(left)} samples can be used: {left[0]}")
    return replace(evaluation(str(model.path), model.step, found), left_out=left)


def evaluation(checkpoint: str, step: int, found: Sequence[Outcome]) -> Evaluation:
    """All scores of what a model made of samples."""
    result = Evaluation(checkpoint, step)
    for source in sources_of([own.answer_key for own in found]):
        own = [outcome for outcome in found if outcome.answer_key.source == source]
        captions, questions, live = (
            [outcome for outcome in own if outcome.answer_key.sample.kind == kind]
            for kind in ("caption", "chat", "realtime")
        )
        result.scores += caption_scores(captions) if captions else []
        if questions:
            scores, answered = question_scores(questions)
            result.scores += scores
            result.samples += answered
        if live:
            result.scores += decision_scores(live)
            if live[0].spoken:
                scores, timelines = live_scores(live)
                result.scores += scores
                result.timelines += timelines
    result.scores += questions_together(result.scores)
    return result


def toy_items(
    model: TrainedModel, limit: int | None, stages: Sequence[str], root: Path | None = None
) -> list[Item]:
    """Held-out samples of the toy world; without `stages` of the checkpoint's own stage.

    Raises EvaluationError where the toy world is not there.
    """
    root = root or Path(model.config.data.root)
    pretrains = model.config.stage.prompt == "pretrain"

    def read() -> Iterator[Item]:
        for stage in stages or [model.config.stage.name]:
            for modality in MODALITIES:
                if pretrains and modality == "text":
                    continue  # not among what these stages train
                folder = root / stage / "heldout" / modality
                yield from read_shards(folder, f"{stage}/{modality}", model.encoder, limit)

    try:
        return list(read())
    except ShardError as error:
        raise EvaluationError(f"{error} (python -m data_pipeline.toy {root} renders it)") from None


def table(scores: Sequence[Score]) -> str:
    """The scores as a table of text, with the controls that there are."""
    controls = [
        name for name in (ONE_FRAME, SHUFFLED) if any(getattr(s, name) is not None for s in scores)
    ]
    head = [
        "source",
        "score",
        "model",
        "blind",
        *(name.replace("_", " ") for name in controls),
        "chance",
        "of",
    ]
    return format_table([head, *(cells(score, controls) for score in scores)], "llr", rule=True)


def cells(score: Score, controls: Sequence[str] = ()) -> list[str]:
    """A line of the table, with those `controls`."""
    under = [getattr(score, name) for name in controls]
    numbers = map(_number, (score.value, score.blind, *under, score.chance))
    return [score.source, score.metric, *numbers, str(score.count)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
