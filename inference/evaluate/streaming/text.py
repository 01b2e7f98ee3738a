"""Finds what a text says: an option's letter, a number, a phrase."""

from __future__ import annotations

import re

_WORDS = re.compile(r"\w+")
_LETTER = re.compile(r"(?<![A-Za-z'])([A-H])(?![A-Za-z'])")
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}


def letter(text: str) -> str:
    """The first letter A to H that stands alone in a text (`B`, `(B)`, `B. A cat`); "": none."""
    found = _LETTER.search(text)
    return found[1] if found else ""


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


def says(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase, word by word."""
    return words(phrase) in words(text)
