"""An answer without a stream: the whole question is there first, then the model speaks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inference.engine.engine import Sampling
from inference.session.response import Speaker, Speech, Vocabulary
from inference.session.session import Plan
from inference.session.stats import Stats


class Answer(Speaker):
    """Takes a question in, `chunk` frames a step, so that other sessions are not held up long."""

    def __init__(
        self,
        name: str,
        tokens: Sequence[int],
        images: Sequence[Tensor],
        words: Vocabulary,
        stats: Stats,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        chunk: int = 8,
        chunk_tokens: int = 512,
    ) -> None:
        super().__init__(name, words, stats)
        self.sampling = sampling
        self.wake: float | None = None
        self.over = False
        self._tokens, self._images = list(tokens), list(images)
        self._most, self._chunk, self._chunk_tokens = max_new_tokens, chunk, chunk_tokens
        self._asked: float | None = None
        self._ends = (words.special.eot_id, words.special.end_of_text, words.special.silence)

    def plan(self, now: float) -> Plan | None:
        """The next chunk of the question, then a word a step."""
        if self._asked is None:
            self._asked = now
        count, frames = 0, 0
        while count < min(len(self._tokens), self._chunk_tokens):
            frames += self._tokens[count] == self._words.special.image
            if frames > self._chunk:
                frames -= 1
                break
            count += 1
        plan = Plan(self._tokens[:count], self._images[:frames], began=now)
        del self._tokens[:count], self._images[:frames]
        plan.sample = not self._tokens
        return plan

    def took(self, plan: Plan, token: int | None, now: float) -> None:
        """Hears the token that the model said to a step."""
        if token is None:
            return
        assert self._asked is not None
        if token in self._ends:
            if self.speech is None:  # an answer without a word is one, too
                self.tell("response.created", response_id=self.name)
                self.speech = Speech(self._words.tokenizer, self.name)
            self._finish("completed", "turn_ended")
            self.over = True
            return
        speech = self._say(token, now, self.name, now - self._asked)
        if len(speech.tokens) == 1:
            self.stats.add("ttft", now - self._asked)
        if len(speech.tokens) >= self._most:
            self._finish("incomplete", "max_new_tokens")
            self.over = True
