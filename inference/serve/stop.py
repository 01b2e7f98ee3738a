"""Stop texts: where an answer ends because of what was said."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Text of an answer up to the first stop text. Holds back what may be the start of one.

    Each character is looked at once for each stop text (Knuth, Morris, Pratt 1977).

    Args:
        stops: none of them is empty.
        keep: the stop text that was said is part of the answer.
    """

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._keep, self._held, self.stopped = keep, "", False
        self._matched = [0] * len(stops)  # characters of each that end what was said

    def append(self, piece: str, *, ends: bool = True) -> str:
        """Takes a piece and returns what cannot belong to a stop text any more. ends: whether one
        that is complete in this piece ends the answer."""
        for at, character in enumerate(piece, 1):
            found = self._take(character)
            if found and ends:
                text, self._held, self.stopped = self._held + piece[:at], "", True
                return text if self._keep else text[: len(text) - found]
        text = self._held + piece
        safe = len(text) - max(self._matched, default=0)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _take(self, character: str) -> int:
        """The length of the longest stop text that ends with this character, or 0."""
        longest = 0
        for number, (stop, borders) in enumerate(self._stops):
            matched = self._matched[number]
            while matched and (matched == len(stop) or stop[matched] != character):
                matched = borders[matched - 1]
            matched += stop[matched] == character
            self._matched[number] = matched
            longest = max(longest, matched if matched == len(stop) else 0)
        return longest


def _borders(stop: str) -> list[int]:
    """For each prefix of `stop`: the length of the longest shorter prefix with which it also ends
    (the failure function of Knuth, Morris and Pratt)."""
    borders = [0] * len(stop)
    for at in range(1, len(stop)):
        size = borders[at - 1]
        while size and stop[at] != stop[size]:
            size = borders[size - 1]
        borders[at] = size + (stop[at] == stop[size])
    return borders
