"""All scores of a set of items, batch by batch, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.shards import ShardError
from data_pipeline.tables import format_table
from data_pipeline.toy.build import MODALITIES
from moss_train.evaluate.items import EvaluationError, Item, read_shards, sources_of
from moss_train.evaluate.model import TrainedModel
from moss_train.evaluate.score import (
    Answered,
    Score,
    Timeline,
    caption_scores,
    decision_scores,
    live_scores,
    question_scores,
    questions_together,
)


@dataclass
class Evaluation:
    """Scores of a checkpoint, its answers, and its streams second by second."""

    checkpoint: str
    step: int
    scores: list[Score] = field(default_factory=list)
    samples: list[Answered] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)

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
    model: TrainedModel, items: Sequence[Item], on_progress: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Scores all items, each by what it is; `on_progress` is called with a line for each source."""
    result = Evaluation(str(model.path), model.step)
    for source in sources_of(list(items)):
        own = [item for item in items if item.source == source]
        on_progress(f"{source}: {len(own)} samples")
        captions = [item for item in own if item.sample.kind == "caption"]
        questions = [item for item in own if item.sample.kind == "chat"]
        live = [item for item in own if item.sample.kind == "realtime"]
        result.scores += caption_scores(model, captions) if captions else []
        if questions:
            scores, answered = question_scores(model, questions)
            result.scores += scores
            result.samples += answered
        if live:
            scores, timelines = live_scores(model, live)
            result.scores += decision_scores(model, live) + scores
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
    """The scores as a table of text."""
    rows = [["source", "score", "model", "blind", "chance", "of"], *map(cells, scores)]
    return format_table(rows, "llr", rule=True)


def cells(score: Score) -> list[str]:
    """A line of the table."""
    numbers = map(_number, (score.value, score.blind, score.chance))
    return [score.source, score.metric, *numbers, str(score.count)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
