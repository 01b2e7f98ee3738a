"""Grammars that an answer follows: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inference.session.response import Vocabulary

# White space between JSON's marks: as people write it, but not without end, which a model may go on
# with that has not learned to write JSON.
_SPACE = r"[\x20\x0A\x0D\x09]{0,16}"


class GrammarError(ValueError):
    """The library does not take a schema, or is not there; the message says why."""


class Grammars:
    """Makes grammars for a vocabulary. Any thread may call it.

    tokens: how many logits there are.
    """

    def __init__(self, vocabulary: Vocabulary, tokens: int) -> None:
        self._vocabulary, self._tokens = vocabulary, tokens
        self._lock = threading.Lock()
        self._made: Any = None  # llguidance's own form of the tokenizer: 0.5 s for 128,000 tokens

    def of_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """Texts that are JSON of a JSON Schema; GrammarError names what the library lacks."""
        library = _library()
        with self._lock:
            if self._made is None:
                tokenizer = self._vocabulary.tokenizer
                self._made = library.LLTokenizer(
                    tokenizer.to_str(),
                    n_vocab=max(self._tokens, tokenizer.get_vocab_size()),
                    eos_token=self._vocabulary.special.eot_id,
                    slices=library.LLTokenizer.json_slices(),
                )
        try:
            rules = library.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": _SPACE}
            )
        except ValueError as error:
            raise GrammarError(_line(str(error))) from None
        matcher = library.LLMatcher(self._made, rules, log_level=0)
        if matcher.is_error():
            raise GrammarError(_line(matcher.get_error()))
        return Grammar(matcher)


class Grammar:
    """Where a text stands in a grammar; of one answer."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        """For another answer, from the same place."""
        return Grammar(self._matcher.deep_copy())

    def mask(self) -> Tensor:
        """`Step.allowed` of the next token."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        self._check()
        return mask

    def take(self, token: int) -> None:
        """The next token of the text."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar failed: {_line(self._matcher.get_error())}")


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise GrammarError("needs the package llguidance on the server") from None
    return llguidance


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
