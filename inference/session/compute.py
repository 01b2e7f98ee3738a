"""What the engine computes in one turn: a step of each session that has one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.engine.slots import Step
from inference.engine.token_choice import read_likely
from inference.session.answer import Answer
from inference.session.handle import RunningSession
from inference.session.inputs import StepRequest
from inference.session.session import Session


def compute(
    engine: Engine, batch: Sequence[tuple[RunningSession, StepRequest]]
) -> list[int | None]:
    """The tokens that the engine samples for these sessions; None where it samples none. Where
    it fails, the requests can be computed again."""
    images = [image for _, request in batch for image in request.images]
    encoded = iter(engine.encode(images) if images else [])
    steps = list[Step | None]()
    for running, request in batch:
        if running.slot is None:
            running.slot = engine.open(_sampling(running.task))
        elif running.slot.sampling != _sampling(running.task):
            engine.set_sampling(running.slot, _sampling(running.task))
        features = [*request.features, *itertools.islice(encoded, len(request.images))]
        if features and not request.tokens:  # also when the others' step failed behind it
            request.features, request.images = features, []
            steps.append(None)
            continue
        options = request.sample, request.allowed, request.likely, request.attend_all
        steps.append(Step(running.slot, request.tokens, features, *options))
    sampled = iter(engine.step([step for step in steps if step is not None]))
    tokens = [None if step is None else next(sampled) for step in steps]
    for (_, request), step in zip(batch, steps, strict=True):
        if step is not None and step.sample and step.likely is not None:
            assert step.slot.likely is not None
            request.likelihoods = read_likely(step.slot.likely, step.likely)
    return tokens


def _sampling(task: Session | Answer) -> Sampling:
    return task.config.sampling if isinstance(task, Session) else task.sampling
