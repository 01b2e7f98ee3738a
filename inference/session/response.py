"""A response while it is generated: tokens -> pieces of text -> events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.prompts import PromptBuilder
from data_pipeline.schema import Role
from data_pipeline.tokens import SpecialTokens
from inference.session.detokenize import TextStream
from inference.session.events import LOG_LIMIT, EventLog
from inference.session.stats import Stats


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, and what writes prompts with it; made once for an engine."""

    tokenizer: Tokenizer
    special: SpecialTokens
    prompts: PromptBuilder
    # `prompts.turn`, the last ones kept: a text is counted when it comes, and written between two
    # steps of the engine, which would wait for 20 ms.
    turn: Callable[[Role, str], tuple[int, ...]]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Raises ValueError where a token is missing, or text cannot be written of tokens."""
        TextStream(tokenizer)
        special = SpecialTokens.from_tokenizer(tokenizer)
        prompts = PromptBuilder(tokenizer, special)

        @lru_cache(maxsize=32)
        def turn(role: Role, text: str) -> tuple[int, ...]:
            return tuple(prompts.turn(role, text))

        return cls(tokenizer, special, prompts, turn)

    def user_turn(self, text: str) -> list[int]:
        """A user's turn, and the header after which the assistant answers."""
        return [*self.turn("user", text), *self.prompts.header("assistant")]


class Response:
    """One response. Text comes as soon as its characters are whole, without special tokens."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.name = name
        self.tokens: list[int] = []
        self._stream = TextStream(tokenizer)
        self._pieces: list[str] = []

    def append(self, token: int) -> str:
        """Takes a token and returns the text that it completes, often none."""
        self.tokens.append(token)
        piece = self._stream.append(token)
        self._pieces.append(piece)
        return piece

    @property
    def text(self) -> str:
        """All pieces; without the half of a character in whose middle the response ended."""
        return "".join(self._pieces)


class ResponseWriter:
    """Writes what the model says as events, and measures it."""

    def __init__(
        self, name: str, vocabulary: Vocabulary, stats: Stats, log_limit: int = LOG_LIMIT
    ) -> None:
        self.name, self.stats = name, stats
        self.log = EventLog(log_limit)
        self.media = 0.0  # seconds of the newest frame that the model has seen
        self.response: Response | None = None
        # Log-probabilities of tokens whose text has not been told: (token, its own, the likeliest).
        self.likelihoods: list[tuple[int, float, list[tuple[int, float]]]] = []
        self._vocabulary = vocabulary
        self._first_token_time = self._last_token_time = (
            0.0  # when the first and the last token of the response came
        )

    def emit(self, type: str, **data: Any) -> None:
        """Writes an event into the log."""
        self.log.append(type, self.media, data)

    def _append_token(self, token: int, now: float, name: str, ttft: float | None) -> Response:
        """Adds a token to the response, or begins one; `ttft`: seconds since it was asked for."""
        if self.response is None:
            self.response = Response(self._vocabulary.tokenizer, name)
            self._first_token_time = now
            self.stats.count("responses")
            first = {} if ttft is None else {"ttft_ms": round(1000 * ttft, 3)}
            self.emit("response.created", response_id=name, **first)
        else:
            self.stats.add("inter_token", now - self._last_token_time)
        self._last_token_time = now
        self.stats.count("tokens")
        text = self.response.append(token)
        if text:
            self._emit_delta(name, text)
        return self.response

    def _emit_delta(self, name: str, text: str, **more: Any) -> None:
        if self.likelihoods:
            more["logprobs"], self.likelihoods = self.likelihoods, []
        self.emit("response.output_text.delta", response_id=name, delta=text, **more)

    def _finish(self, status: str, reason: str) -> None:
        """Ends the response, if any. status: completed, cancelled, incomplete or failed."""
        if self.response is None:
            return
        response = self.response
        if self.likelihoods:  # of the half of a character
            self._emit_delta(response.name, "")
        self.response = None
        count, spent = len(response.tokens), self._last_token_time - self._first_token_time
        usage: dict[str, float] = {"output_tokens": count}
        if count > 1 and spent > 0:
            usage["tokens_per_second"] = round((count - 1) / spent, 2)
        self.emit(
            "response.done",
            response_id=response.name,
            status=status,
            reason=reason,
            text=response.text,
            usage=usage,
        )

    def close(self, status: str, reason: str) -> None:
        """Ends what is being said, for the session is about to be closed."""
        self._finish(status, reason)
