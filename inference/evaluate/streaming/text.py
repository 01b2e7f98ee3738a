"""Finds what a text says: an option's letter, a number, a phrase."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WORDS = re.compile(r"\w+")
_ALONE = re.compile(r"[\W_]*([A-Ha-h])[\W_]*")
# `A` before a word is an article, but after `option`, and for words that go on after an answer.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9'])"
    r"(?:(?<=[Oo]ption )|(?<=[Cc]hoice )|(?<=[Aa]nswer )|(?<=[Aa]nswer is )|"
    r"(?!A\s+(?!(?:is|was|as|because|since|and|or|seems|looks)\b)[a-z0-9]))"
    r"([A-H])(?!['’]|-?[A-Za-z0-9])"
)
_SMALL = re.compile(
    r"\(([a-h])\)|\b(?:answer|option|choice)(?: is)?[\s:*(]*([a-h])(?=[\s*).]*$|[).])",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"\s*\(?[A-H][.):]\s*")
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}


def letter(text: str) -> str:
    """The first letter A to H that stands alone in a text (`B`, `(b)`, `**B.** A cat`, `Ｂ`) and is
    no article (`A cat`); "": none."""
    text = unicodedata.normalize("NFKC", text)
    if found := _ALONE.fullmatch(text) or _LETTER.search(text):
        return found[1].upper()
    small = _SMALL.search(text)
    return (small[1] or small[2]).upper() if small else ""


def choice(text: str, options: Sequence[str]) -> str:
    """The letter of the option that a text names: the one whose words it is, else by `letter`. "":
    none. Options may begin with their letter (`B. A cat`)."""
    if _ALONE.fullmatch(unicodedata.normalize("NFKC", text)):
        return letter(text)
    said = words(text)
    same = [n for n, option in enumerate(options) if _words_of(option) == said]
    return chr(ord("A") + same[0]) if len(same) == 1 else letter(text)


def _words_of(option: str) -> str:
    """The words of an option without its own letter."""
    own = _LETTERED.match(option)
    return words(option[own.end() :] if own else option)


def last_number(text: str) -> int | None:
    """The last number in a text, in digits or as a word up to ten; None: there is none."""
    numbers = [
        int(word) if word.isdecimal() else _NUMBERS[word]
        for word in _WORDS.findall(text.lower())
        if word.isdecimal() or word in _NUMBERS
    ]
    return numbers[-1] if numbers else None


def words(text: str) -> str:
    """A text in the form in which phrases are compared: words in lower case between spaces."""
    return f" {' '.join(_WORDS.findall(text.lower()))} "


def contains_phrase(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase, word by word."""
    return words(phrase) in words(text)
