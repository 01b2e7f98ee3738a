"""`trainer.eval_suites`: the model as it trains, in its layout, is asked about samples."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moss_train.data_config import CONTROLS, EvalSuiteConfig
from moss_train.evaluate.items import Item, suite_samples
from moss_train.evaluate.outcomes import outcomes
from moss_train.evaluate.replica import ReplicaModel
from moss_train.evaluate.score import Score
from moss_train.evaluate.share import share_out
from moss_train.evaluate.suite import evaluation
from moss_train.log import log
from moss_train.train.data import StepReader
from moss_train.train.heartbeat import beat, uncounted
from moss_train.train.step import TrainStep, gather_counts


class Suites:
    """Scores of all suites of a run. Nothing of the training is changed by asking."""

    def __init__(self, step: TrainStep, reader: StepReader):
        self.step, self.reader, self.config = step, reader, step.config
        groups = step.model.groups
        self.model = ReplicaModel(self.config, step.state.chunks, step.exchange, groups)

    def __call__(self, stop_requests: Sequence[float] = ()) -> dict[str, dict[str, float]] | None:
        """`{suite: {score: value, score (control): value}}`; None where it was cut short. A
        collective.

        stop_requests: times of signals to stop, filled by their handler; a replica whose leader
        got one reads no further.
        """
        self.stop_requests, self.cut = stop_requests, 0
        self.reader.settle()
        self.step.state.gather_parameters()
        found: dict[str, dict[str, float]] = {}
        with torch.no_grad(), uncounted():  # each replica has its own samples
            for suite in self.config.trainer.eval_suites:
                found[suite.name] = self._scores(suite)
        beat("after the suites")
        return None if gather_counts({"cut": self.cut}).get("cut") else found

    def _scores(self, suite: EvalSuiteConfig) -> dict[str, float]:
        def outcomes_of(block: list[Item]) -> list[Any]:
            return outcomes(self.model, block, suite.controls, suite.scores == "all")

        items = self._items(suite)
        done = share_out(self.model, items, outcomes_of, refuse=self._refuse)
        scores = evaluation(suite.name, 0, done).scores
        return {name: value for score in scores for name, value in named(score)}

    def _items(self, suite: EvalSuiteConfig) -> Iterator[Item]:
        """Samples until a shard cannot be read: that ends the suite, not the job."""
        path = Path(suite.path)
        try:
            for item in suite_samples(path, suite.name, self.model.encoder, suite.samples):
                if self.stop_requests:
                    self.cut = 1
                    return
                yield item
        except (OSError, ValueError, tarfile.TarError) as error:
            log.error("suite %s: the rest of %s is left out: %s", suite.name, path, error)

    def _refuse(self, error: Exception) -> None:
        log.warning("suite: left out %s", error)


def named(score: Score) -> Iterator[tuple[str, float]]:
    """A score and its controls, each with its name."""
    name, values = score.metric.strip(), asdict(score)
    yield name, score.value
    for control in CONTROLS:
        if values[control] is not None:
            yield f"{name} ({control})", values[control]
