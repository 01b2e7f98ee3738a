"""What is measured on held-out data after a step, where it is due: losses, and scores of suites."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moss_train.config import Config
from moss_train.log import log
from moss_train.train.data import StepReader
from moss_train.train.step import StepResult, TrainStep
from moss_train.train.validation import Validator, describe

# Scores of `trainer.eval_suites`; None where it was cut short. Called with the signals to stop.
AskSuites = Callable[[Sequence[float]], dict[str, dict[str, float]] | None]
OpenSuites = Callable[[TrainStep, StepReader], AskSuites]
T = TypeVar("T")


@dataclass
class Measured:
    """What was measured after one step; None: it was not due, or a signal cut it short. seconds:
    how long it took."""

    validation: dict[str, Any] | None = None
    suites: dict[str, dict[str, float]] | None = None
    seconds: float = 0.0


class HeldOut:
    """Validates every `trainer.eval_every` steps, asks suites every `trainer.eval_suites_every`,
    and both after the last step."""

    def __init__(
        self, config: Config, step: TrainStep, reader: StepReader, suites: OpenSuites | None
    ):
        self.trainer, self.last = config.trainer, config.steps
        self.validator = Validator(step, reader)
        open_suites = suites if config.trainer.eval_suites else None
        self.suites = None if open_suites is None else open_suites(step, reader)

    def __call__(self, done: int, result: StepResult, stop_requests: Sequence[float]) -> Measured:
        """Measures after step `done`, if the step was accepted and nobody asks to stop. A
        collective."""
        measured = Measured()
        if result.refused is not None or result.stop:
            return measured
        began = time.perf_counter()
        every, last = self.trainer.eval_every, done == self.last
        if every is not None and (done % every == 0 or last):
            measured.validation = self.validator(stop_requests)
            _log(done, "validation", measured.validation, describe, began)
        every = self.trainer.eval_suites_every
        if self.suites is not None and (last or (every is not None and done % every == 0)):
            asking = time.perf_counter()
            measured.suites = self.suites(stop_requests)
            _log(done, "suites", measured.suites, describe_suites, asking)
        measured.seconds = time.perf_counter() - began
        return measured


def _log(done: int, what: str, found: T | None, describe: Callable[[T], str], began: float) -> None:
    if found is None:
        log.warning("step %d: %s: left out: asked to stop", done, what)
    else:
        log.info("step %d: %s %s, %.1f s", done, what, describe(found), time.perf_counter() - began)


def describe_suites(suites: dict[str, dict[str, float]]) -> str:
    """`mine: answers exact 0.500, answers exact (blind) 0.250; other: ...`"""
    parts = [
        f"{name}: " + ", ".join(f"{score} {value:.3f}" for score, value in scores.items())
        for name, scores in suites.items()
    ]
    return "; ".join(parts) or "none"
