"""A session whose model says what a test tells it to say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer

from data_pipeline.tokens import SpecialTokens
from inference.session.inputs import Frame, Prompt, StepRequest
from inference.session.response import Vocabulary
from inference.session.session import Session, SessionConfig
from inference.session.stats import Stats

BLACK = torch.zeros(3, 8, 8, dtype=torch.uint8)


def make(tokenizer: Tokenizer, **fields: Any) -> Session:
    return Session("s", SessionConfig(**fields), Vocabulary.of(tokenizer), Stats())


class Model:
    """Says what it is told to say, and keeps the context as an engine would."""

    def __init__(self, session: Session, special: SpecialTokens) -> None:
        self.session, self.special = session, special
        self.context: list[int] = []
        self.now = 0.0

    def frame(self, at: float = 0.0, prompt: str | None = None) -> None:
        self.session.push(Frame(BLACK, at, self.now, prompt))

    def ask(self, text: str) -> None:
        self.session.ask(Prompt(text, self.now))

    def step(self, token: int) -> StepRequest:
        """The session takes a step, to which the model says `token`."""
        request = self.session.next_step(self.now)
        assert request is not None
        self.context += [*request.tokens, token]
        assert request.tokens.count(self.special.image) == len(request.images)
        self.now += 0.25
        self.session.on_token(request, token, self.now)
        return request

    def say(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.step(token)

    def emitted(self, type: str) -> list[dict[str, Any]]:
        return [e.data for e in self.session.log.after(0, 10**6) if e.type == type]


def started(tokenizer: Tokenizer, **fields: Any) -> Model:
    return Model(make(tokenizer, **fields), SpecialTokens.from_tokenizer(tokenizer))
