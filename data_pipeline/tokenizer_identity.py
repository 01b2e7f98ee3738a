"""Whether two tokenizers give a model's ids the same meaning.

What decides that is hashed: how text becomes ids (vocabulary, merges, normalizer, pre-tokenizer),
back (decoder), and the added tokens with their ids. What does not is left out: the form of the
file, truncation and padding, and what stands around a text (`post_processor`), which the prompts of
training write themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.tokens import SpecialTokens, load_tokenizer, token_text

SPECIAL = [token_text(field.name) for field in fields(SpecialTokens)]


@dataclass(frozen=True)
class TokenizerIdentity:
    """What is kept of a tokenizer beside the weights that were trained with it.

    text: digest of how text becomes ids and back. added: digest of the added tokens.
    size: number of tokens. special: ids of those of training's special tokens that it has, by text.
    """

    text: str
    added: str
    size: int
    special: dict[str, int]

    @property
    def digest(self) -> str:
        """A digest of all that tells tokenizers apart."""
        return _digest([self.text, self.added])

    def to_dict(self) -> dict[str, Any]:
        """As it is saved."""
        return {"digest": self.digest, **asdict(self)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> TokenizerIdentity:
        """The inverse of `to_dict`."""
        return cls(saved["text"], saved["added"], int(saved["size"]), dict(saved["special"]))

    def extends(self, old: TokenizerIdentity) -> bool:
        """True where all that `old` says is the same here; only added tokens may differ that are
        not among training's special tokens."""
        return self.text == old.text and not list(self._moved(old))

    def differences(self, old: TokenizerIdentity) -> str:
        """In words, how this tokenizer differs from `old`; empty where it does not."""
        parts = list(self._moved(old))
        if self.text != old.text:
            parts.insert(0, "other vocabulary, merges or normalizer")
        elif self.added != old.added and not parts:
            parts = ["other added tokens"]
        if self.size != old.size:
            parts.append(f"{self.size} tokens, not {old.size}")
        if not parts:
            return ""
        return f"digest {self.digest}, not {old.digest}: {', '.join(parts)}"

    def _moved(self, old: TokenizerIdentity) -> Iterator[str]:
        for token, number in old.special.items():
            if self.special.get(token) != number:
                yield f"{token} is {self.special.get(token)}, not {number}"


def identify(path: str | Path) -> TokenizerIdentity:
    """Reads the identity of an HF tokenizer folder (or its tokenizer.json).

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    state = file.stat() if file.is_file() else None
    return _identify(file, state and (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=4)  # it takes a second for 128,000 tokens
def _identify(file: Path, _state: object) -> TokenizerIdentity:
    tokenizer = load_tokenizer(file)
    plain = json.loads(tokenizer.to_str())  # the library's present form, whatever the file's is
    added = sorted(plain["added_tokens"], key=lambda token: token["id"])
    decoder, normalizer = plain["decoder"], plain["normalizer"]
    if decoder and decoder["type"] == "ByteLevel":
        decoder = {"type": "ByteLevel"}  # only the pre-tokenizer of this type has options
    if normalizer is None:
        for token in added:
            del token["normalized"]
    model = plain["model"]
    words, merges = model.pop("vocab"), model.pop("merges", None) or []
    if isinstance(words, dict):
        names = {token["content"] for token in added}
        words = sorted([number, word] for word, number in words.items() if word not in names)
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    rules = _stated([model, normalizer, plain["pre_tokenizer"], decoder])
    ids = {word: tokenizer.token_to_id(word) for word in SPECIAL}
    return TokenizerIdentity(
        _digest([words, merges, rules]),
        _digest(_stated(added)),
        tokenizer.get_vocab_size(),
        {word: number for word, number in ids.items() if number is not None},
    )


def _stated(value: Any) -> Any:
    """A part of the file without what is null, false or empty, which other versions of the file do
    not write, and without the option that only moves the places of tokens in a text."""
    if isinstance(value, dict):
        parts = {key: _stated(part) for key, part in value.items() if key != "trim_offsets"}
        return {key: part for key, part in parts.items() if not _is_unsaid(part)}
    return [_stated(part) for part in value] if isinstance(value, list) else value


def _is_unsaid(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
