"""Conversations that are pairs of a question and its answer, to drafts.

The Cauldron's and FineVision's records have all pairs in `texts`; ms-swift's have the last one as
`query` and `response`, the ones before in `history`. Media that no mark places stand before the
first question, as in both projects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.importers.conversation import Dialect, system_turn, with_media
from data_pipeline.importers.draft import Convert, Draft, Turn, unused_fields
from data_pipeline.schema import SampleError

_PAIR = frozenset({"user", "assistant"})
_CAULDRON = Dialect(messages="texts", media_first=True)
_SWIFT = Dialect(messages="query", others=("response", "history"), media_first=True)


def looks_like_cauldron(record: Mapping[str, Any]) -> bool:
    pairs = record.get("texts")
    first = pairs[0] if isinstance(pairs, list) and pairs else None
    return isinstance(first, dict) and first.keys() >= _PAIR


def looks_like_swift(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(name), str) for name in ("query", "response"))


def draft_of(record: Mapping[str, Any]) -> Convert | None:
    """What makes a draft of a record of pairs; None: it is none."""
    if looks_like_cauldron(record):
        return cauldron_draft
    return swift_draft if looks_like_swift(record) else None


def cauldron_draft(record: dict[str, Any], base: str) -> Draft:
    """`texts: [{"user": ..., "assistant": ...}, ...]` with `images` -> a draft; SampleError."""
    pairs = record.get("texts")
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise SampleError("bad_schema", f"texts: {pairs!r:.80}: expected a list of objects with "
                          "user and assistant")  # fmt: skip
    if not pairs:
        raise SampleError("missing_text", "texts: there is no question with its answer")
    messages, notes = system_turn(record, _CAULDRON), []
    for i, pair in enumerate(pairs):
        messages += turn(pair.get("user"), pair.get("assistant"), f"texts[{i}]")
        notes += unused_fields(pair, _PAIR, "texts[].")
    return with_media(messages, record, base, _CAULDRON, notes)


def swift_draft(record: dict[str, Any], base: str) -> Draft:
    """`query` and `response`, with the `history` before -> a draft; SampleError."""
    messages = system_turn(record, _SWIFT) + history_turns(record.get("history"), "history")
    messages += turn(record.get("query"), record.get("response"), "query, response")
    return with_media(messages, record, base, _SWIFT)


def history_turns(history: Any, field: str) -> list[Turn]:
    """The turns of `[[question, answer], ...]`; SampleError."""
    if not isinstance(history or [], list):
        raise SampleError("bad_schema", f"{field}: {history!r:.80}: expected a list")
    turns: list[Turn] = []
    for i, pair in enumerate(history or []):
        if not isinstance(pair, list) or len(pair) != 2:
            detail = f"{field}[{i}]: {pair!r:.80}: expected [question, answer]"
            raise SampleError("bad_schema", detail)
        turns += turn(pair[0], pair[1], f"{field}[{i}]")
    return turns


def turn(question: Any, answer: Any, field: str) -> list[Turn]:
    """A question and its answer as two messages; SampleError where they are no texts."""
    if not isinstance(question, str) or not isinstance(answer, str):
        detail = f"{field}: {question!r:.40}, {answer!r:.40}: a turn is two texts"
        raise SampleError("bad_schema", detail)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
