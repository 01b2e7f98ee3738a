"""Grammars that an answer follows: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from inference.session.response import Vocabulary

# One line, as json.dumps and OpenAI's API write it. Where white space is free, a model that has not
# learned to write JSON goes on with it, at each mark, until the answer is cut off.
_MARKS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

_LONGEST = 2**16  # characters of a schema: with more, each token takes a tenth of a second


class GrammarError(ValueError):
    """The library does not take a schema, fails in the middle of a text, or is not there; the
    message says why."""


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
        library, written = _library(), json.dumps(schema)
        if len(written) > _LONGEST:
            words = f"{len(written)} characters are more than {_LONGEST}"
            raise GrammarError(words)
        _refuse_circles(schema)
        with self._lock:
            if self._made is None:
                tokenizer = self._vocabulary.tokenizer
                self._made = library.LLTokenizer(
                    _without_names(tokenizer.to_str()),
                    n_vocab=max(self._tokens, tokenizer.get_vocab_size()),
                    eos_token=self._vocabulary.special.eot_id,
                    slices=library.LLTokenizer.json_slices(),
                )
        try:
            rules = library.LLMatcher.grammar_from_json_schema(written, defaults=_MARKS)
        except ValueError as error:
            raise GrammarError(_line(str(error))) from None
        matcher = library.LLMatcher(self._made, rules, log_level=0)
        if matcher.is_error():
            raise GrammarError(_line(matcher.get_error()))
        grammar = Grammar(matcher)
        grammar.mask()  # most of what is too large for the library fails here
        return grammar


class Grammar:
    """The state of one answer's text in a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        """A copy for another answer, in the same state."""
        return Grammar(self._matcher.deep_copy())

    def mask(self) -> Tensor:
        """`Step.allowed` of the next token."""
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        self._check()
        return mask

    def take(self, token: int) -> None:
        """Takes the next token of the text."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {_line(self._matcher.get_error())}")


def _without_names(tokenizer: str) -> str:
    """A tokenizer in which no text spells a special token. Where a grammar leaves no choice, the
    library takes the tokens that its tokenizer makes of the text: of `"<|eot_id|>"` in a schema
    that would be the end of the answer."""
    written, key = json.loads(tokenizer), secrets.token_hex(8)
    for token in written["added_tokens"]:
        if token["special"]:
            token["content"] = f"{key}-{token['id']}"
    return json.dumps(written)


def _refuse_circles(schema: Mapping[str, Any]) -> None:
    """Raises GrammarError for a `$ref` that leads to itself: no value is of such a schema, which
    the library finds out in the middle of an answer."""
    followed = set[str]()
    nodes: list[Any] = [schema]
    while nodes:
        node = nodes.pop()
        nodes += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        chain: dict[str, None] = {}
        while isinstance(node, dict) and isinstance(node.get("$ref"), str):
            name = node["$ref"]
            if name in chain:
                raise GrammarError(f"$ref {name:.80}: refers to itself")
            if name in followed:
                break
            chain[name] = None
            node = _referred(schema, name)
        followed.update(chain)


def _referred(schema: Any, name: str) -> Any:
    """What a `$ref` of the same document names, `#/a/b`; None: the library says what is wrong."""
    if name.partition("#")[0]:
        return None
    for part in unquote(name.removeprefix("#")).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        try:
            schema = schema[int(part)] if isinstance(schema, list) else schema[part]
        except (LookupError, TypeError, ValueError):
            return None
    return schema


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise GrammarError("needs the package llguidance on the server") from None
    return llguidance


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
