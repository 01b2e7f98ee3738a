"""A response while it is said: tokens in, pieces of text and events out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from data_pipeline.prompts import PromptBuilder
from data_pipeline.tokens import SpecialTokens
from inference.session.events import EventLog
from inference.session.stats import Stats


@dataclass(frozen=True)
class Vocabulary:
    """What writing and reading tokens needs: made once for an engine."""

    tokenizer: Tokenizer
    special: SpecialTokens
    prompts: PromptBuilder

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        special = SpecialTokens.from_tokenizer(tokenizer)
        return cls(tokenizer, special, PromptBuilder(tokenizer, special))


class Speech:
    """One response. Text comes out as soon as its bytes are whole; special tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.name = name
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._told = ""

    def say(self, token: int) -> str:
        """Takes a token and returns the text that it completes, often none."""
        self.tokens.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        self._told += piece
        return piece

    def rest(self) -> str:
        """What `say` has held back, where a response ends in the middle of a character."""
        return self.text[len(self._told) :] if self.text.startswith(self._told) else ""

    @property
    def text(self) -> str:
        return self._tokenizer.decode(self.tokens, skip_special_tokens=True)


class Speaker:
    """Tells in events what the model says, and measures it."""

    def __init__(self, name: str, words: Vocabulary, stats: Stats, log_limit: int = 65536) -> None:
        self.name, self.stats = name, stats
        self.log = EventLog(log_limit)
        self.media = 0.0  # seconds of the newest frame that the model has seen
        self.speech: Speech | None = None
        self._words = words
        self._began_at = self._spoke_at = 0.0  # when the speech's first and last token came

    def tell(self, type: str, **data: Any) -> None:
        """Writes an event into the log."""
        self.log.append(type, self.media, data)

    def _say(self, token: int, now: float, name: str, ttft: float | None) -> Speech:
        """Adds a token to the speech, or begins one; `ttft`: seconds since it was asked for."""
        if self.speech is None:
            self.speech = Speech(self._words.tokenizer, name)
            self._began_at = now
            self.stats.count("responses")
            first = {} if ttft is None else {"ttft_ms": round(1000 * ttft, 3)}
            self.tell("response.created", response_id=name, **first)
        else:
            self.stats.add("inter_token", now - self._spoke_at)
        self._spoke_at = now
        self.stats.count("tokens")
        self._tell_text(self.speech, self.speech.say(token))
        return self.speech

    def _finish(self, status: str, reason: str) -> None:
        """Ends the speech, if there is one. status: completed, cancelled, incomplete or failed."""
        if self.speech is None:
            return
        speech, self.speech = self.speech, None
        self._tell_text(speech, speech.rest())
        count, spent = len(speech.tokens), self._spoke_at - self._began_at
        usage: dict[str, float] = {"output_tokens": count}
        if count > 1 and spent > 0:
            usage["tokens_per_second"] = round((count - 1) / spent, 2)
        self.tell(
            "response.done",
            response_id=speech.name,
            status=status,
            reason=reason,
            text=speech.text,
            usage=usage,
        )

    def _tell_text(self, speech: Speech, text: str) -> None:
        if text:
            self.tell("response.output_text.delta", response_id=speech.name, delta=text)
