"""A question without a stream: all of it is there at once, then the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inference.engine.engine import Engine
from inference.engine.sampling import Sampling
from inference.engine.token_choice import all_but
from inference.session.grammar import Grammar
from inference.session.inputs import StepRequest
from inference.session.response import Response, ResponseWriter, Vocabulary
from inference.session.session import CHUNK_TOKENS
from inference.session.stats import Stats

MAX_NEW_TOKENS = 1024  # of an answer, by default
CHUNK_FRAMES = 8  # maximum of a question in one step
LARGE_CHUNK_FRAMES = 32  # the same where no other session waits


def attends_all(engine: Engine) -> bool:
    """Whether in the model's training tokens before the first frame attended all frames, as in the
    published code: so they do in a question, not in a stream, whose frames are still to come."""
    return bool(engine.config.tokens_before_first_frame == "attend_all")


def check_fits(engine: Engine, tokens: Sequence[int], images: Sequence[Tensor]) -> None:
    """ValueError for a question of which the engine would drop a part before it is answered: of a
    stream, or a video that is watched as one, that is what the window is for."""
    if len(images) > engine.window:
        raise ValueError(
            f"the question has {len(images)} pictures and frames, and the model sees "
            f"window={engine.window} at once (--window): give fewer, or a larger window"
        )
    if len(tokens) >= engine.max_tokens:
        raise ValueError(
            f"the question has {len(tokens)} tokens, and with an answer max_tokens="
            f"{engine.max_tokens} are kept (--max_context): give less, or a larger max_tokens"
        )


@dataclass(frozen=True)
class AnswerEnd:
    """When an answer ends, beside where the model ends it.

    least: tokens that it has at least, whatever would end it.
    tokens: after one of these it is over. keep: it has that token, too.
    """

    least: int = 0
    tokens: frozenset[int] = frozenset()
    keep: bool = False


class Answer(ResponseWriter):
    """Takes a question in, `chunk` frames per step, so that other sessions do not wait long.

    Args:
        ignore_end: it goes on where the model ends it.
        end: when else it ends.
        logits: of how many tokens the model has one.
        grammar: its text follows it, and ends with it.
        likely: how many of the most likely tokens the log-probabilities of each token tell; None:
            there are none.
        shared: there are more answers to this question. One of them takes it in but for its last
            token, from which each goes on by itself.
        attend_all: tokens before the first frame attend all frames. These are encoded `chunk` by
            `chunk`, and then come in one step.
    """

    def __init__(
        self,
        name: str,
        tokens: Sequence[int],
        images: Sequence[Tensor],
        vocabulary: Vocabulary,
        stats: Stats,
        *,
        sampling: Sampling,
        max_new_tokens: int = MAX_NEW_TOKENS,
        chunk: int = CHUNK_FRAMES,
        logits: int,
        ignore_end: bool = False,
        end: AnswerEnd = AnswerEnd(),
        grammar: Grammar | None = None,
        likely: int | None = None,
        shared: bool = False,
        attend_all: bool = False,
    ) -> None:
        super().__init__(name, vocabulary, stats)
        self.sampling = sampling
        self.wake: float | None = None
        self.over = False
        self._tokens, self._images = list(tokens), list(images)
        self._max_new_tokens, self._chunk, self._shared = max_new_tokens, chunk, shared
        self._grammar, self._likely_tokens = grammar, likely
        self._attend_all, self._features = attend_all, list[Tensor]()
        self._prompt_time: float | None = None
        special = vocabulary.special
        ends = (special.eot_id, special.end_of_text, special.silence)
        self._ends = {*(() if ignore_end else ends), *end.tokens}
        self._ending = end
        self._goes_on = all_but(self._ends, logits) if end.least else None

    @property
    def is_prefilled(self) -> bool:
        """Whether all of the question that it shares with other answers, and no more, is in its
        slot."""
        return self._shared and self._prompt_time is not None and len(self._tokens) == 1

    def take_over(self, other: Answer) -> None:
        """Goes on from where another answer to the question is, whose context its slot has now."""
        self._tokens, self._images = list(other._tokens), list(other._images)
        self._prompt_time = other._prompt_time

    def next_step(self, now: float) -> StepRequest | None:
        """The next chunk of the question; after the last, one token per step."""
        if self._prompt_time is None:
            self._prompt_time = now
        if self._attend_all and self._images:
            images, self._images = self._images[: self._chunk], self._images[self._chunk :]
            return StepRequest([], images, sample=False, began=now)
        count, frames = self._next_chunk()
        request = StepRequest(self._tokens[:count], self._images[:frames], self._features)
        request.began, request.attend_all = now, bool(self._features)
        self._features = []
        del self._tokens[:count], self._images[:frames]
        request.sample = not self._tokens
        if request.sample:
            request.allowed = self._goes_on if self._token_count < self._ending.least else None
            if self._grammar is not None:
                request.allowed = self._grammar.mask()
            request.likely = self._likely_tokens
        return request

    @property
    def _token_count(self) -> int:
        """How many tokens it has so far."""
        return 0 if self.response is None else len(self.response.tokens)

    def _next_chunk(self) -> tuple[int, int]:
        """How many tokens and frames of the question the next step takes in."""
        image, left = self._vocabulary.special.image, len(self._tokens)
        if self._features:
            return left - self._tokens[::-1].index(image), 0
        count = frames = 0
        if self._shared and left > 1:
            left -= 1
        while count < min(left, CHUNK_TOKENS):
            frames += self._tokens[count] == image
            if frames > self._chunk:
                frames -= 1
                break
            count += 1
        return count, frames

    def on_token(self, request: StepRequest, token: int | None, now: float) -> None:
        """Takes the token that the model sampled after a step, or features of its frames."""
        if not request.tokens:
            self._features += request.features
        if token is None:
            return
        assert self._prompt_time is not None
        last = token in self._ends
        if last and not (self._ending.keep and token in self._ending.tokens):
            if self.response is None:  # an answer without a word is a response, too
                self.emit("response.created", response_id=self.name)
                self.response = Response(self._vocabulary.tokenizer, self.name)
            self._end("completed", "turn_ended")
            return
        if request.likelihoods is not None:
            self.likelihoods.append((token, *request.likelihoods))
        response = self._append_token(token, now, self.name, now - self._prompt_time)
        if len(response.tokens) == 1:
            self.stats.add("ttft", now - self._prompt_time)
        if self._grammar is not None:
            self._grammar.take(token)
            last = last or self._grammar.complete
        if last:
            return self._end("completed", "turn_ended")
        if len(response.tokens) >= self._max_new_tokens:
            self._end("incomplete", "max_new_tokens")

    def _emit_delta(self, name: str, text: str, **more: Any) -> None:
        """Says how many tokens the answer has so far, where it matters for stop texts."""
        more |= {"tokens": self._token_count} if self._ending.least else {}
        super()._emit_delta(name, text, **more)

    def _end(self, status: str, reason: str) -> None:
        self._finish(status, reason)
        self.over = True
