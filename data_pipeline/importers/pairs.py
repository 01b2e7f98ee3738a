"""Conversations that are pairs of a question and its answer, to drafts.

The Cauldron's and FineVision's records have all pairs in `texts`, VideoChat2's and TimeChat's in
`QA`; ms-swift's have the last one as `query` and `response`, the ones before in `history`. A record
of one pair has it under one of the names in `_NAMES`. Media that no mark places stand before the
first question, as in these projects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_pipeline.importers.conversation import Dialect, system_turn, with_media
from data_pipeline.importers.draft import (
    VIDEO_FIELDS,
    VIDEO_IDS,
    Convert,
    Draft,
    Turn,
    names_medium,
    surely_medium,
    unused_fields,
)
from data_pipeline.importers.spans import span_of
from data_pipeline.importers.unwanted import refuse_choices, refuse_unread_media
from data_pipeline.schema import SampleError

_PAIR = frozenset({"user", "assistant"})
_CAULDRON = Dialect(messages="texts", media_first=True)
_SWIFT = Dialect(messages="query", others=("response", "history"), media_first=True)
_NAMES = (
    ("question", "answer"), ("q", "a"), ("input", "output"), ("prompt", "completion"),
    ("problem", "solution"),
)  # fmt: skip
# What a question may be about beside it, which nobody can say where to put.
_CONTEXT = ("context", "passage", "paragraph", "document", "article")
_INSTRUCTION, _QUESTION, _ANSWER = "i", "q", "a"  # of VideoChat2's pairs


def looks_like_cauldron(record: Mapping[str, Any]) -> bool:
    pairs = record.get("texts")
    first = pairs[0] if isinstance(pairs, list) and pairs else None
    return isinstance(first, dict) and first.keys() >= _PAIR


def looks_like_swift(record: Mapping[str, Any]) -> bool:
    return all(isinstance(record.get(name), str) for name in ("query", "response"))


def looks_like_videochat(record: Mapping[str, Any]) -> bool:
    pairs = record.get("QA")
    first = pairs[0] if isinstance(pairs, list) and pairs else None
    return isinstance(first, dict) and first.keys() >= {_QUESTION, _ANSWER}


def looks_like_pair(record: Mapping[str, Any]) -> bool:
    return _pair(record) is not None


def _pair(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The names of a record's question and answer; None: it has no such."""
    return next(
        (pair for pair in _NAMES if all(isinstance(record.get(n), str) for n in pair)), None
    )


def draft_of(record: Mapping[str, Any]) -> Convert | None:
    """What makes a draft of a record of pairs; None: it is none."""
    if looks_like_cauldron(record):
        return cauldron_draft
    if looks_like_videochat(record):
        return videochat_draft
    return swift_draft if looks_like_swift(record) else None


def cauldron_draft(record: dict[str, Any], base: str) -> Draft:
    """`texts: [{"user": ..., "assistant": ...}, ...]` with `images` -> a draft; SampleError."""
    pairs = _objects(record, "texts", "user and assistant")
    messages, notes = system_turn(record, _CAULDRON), []
    for i, pair in enumerate(pairs):
        messages += turn(pair.get("user"), pair.get("assistant"), f"texts[{i}]")
        notes += unused_fields(pair, _PAIR, "texts[].")
    return with_media(messages, record, base, _CAULDRON, notes)


def videochat_draft(record: dict[str, Any], base: str) -> Draft:
    """`QA: [{"i": instruction, "q": ..., "a": ...}, ...]` with a video or picture -> a draft. An
    instruction stands before its question, once; `start` and `end` are seconds of the video."""
    messages: list[Turn] = []
    notes: list[str] = []
    before = None
    for i, pair in enumerate(_objects(record, "QA", "q and a")):
        instruction = pair.get(_INSTRUCTION)
        question = [instruction if instruction != before else None, pair.get(_QUESTION)]
        if not all(isinstance(text, str | None) for text in question):
            raise SampleError("bad_schema", f"QA[{i}]: {pair!r:.80}: i and q are no texts")
        messages += turn("\n".join(filter(None, question)), pair.get(_ANSWER), f"QA[{i}]")
        notes += unused_fields(pair, (_INSTRUCTION, _QUESTION, _ANSWER), "QA[].")
        before = instruction
    span = span_of(record)
    dialect = _dialect(record, "QA", *(span.fields if span else ()))
    draft = with_media(messages, record, base, dialect, notes)
    if span is None or [medium.type for medium in draft.media] != ["video"]:
        return draft
    return replace(draft, media=[replace(draft.media[0], part=span.parts[0])])


def pair_draft(record: dict[str, Any], base: str) -> Draft:
    """A question and its answer, with or without media -> a draft; SampleError."""
    names = _pair(record)
    if names is None:
        fields = ", ".join("/".join(pair) for pair in _NAMES)
        raise SampleError("missing_text", f"no question with its answer: {fields}")
    refuse_choices(record)
    for name in _CONTEXT:
        if record.get(name):
            raise SampleError("bad_schema", f"{name}: what the question is about is not put in: "
                              "write it into the question")  # fmt: skip
    _refuse_files(record, names)
    dialect = _dialect(record, *names, "history")
    messages = system_turn(record, dialect) + history_turns(record.get("history"), "history")
    messages += turn(record[names[0]], record[names[1]], names[0])
    draft = with_media(messages, record, base, dialect)
    if not draft.media:
        mend = "call it images or videos, or give --media-column"
        refuse_unread_media(record, dialect.known, True, mend)
    return draft


def _refuse_files(record: Mapping[str, Any], names: tuple[str, str]) -> None:
    """SampleError for a question or an answer that is the name of a picture or video."""
    for name in names:
        text = record[name].strip()
        if surely_medium(text) and len(text.split()) == 1:
            detail = f"{name}: {text!r:.80} is the name of a file, not a text: name it in "
            raise SampleError("bad_schema", f"{detail}images or videos")


def _dialect(record: Mapping[str, Any], name: str, *others: str) -> Dialect:
    """Of a record whose media may be named by an id alone."""
    usual = Dialect(messages=name, others=others, media_first=True)
    if any(names_medium(record.get(field)) for field in (*usual.images, *usual.videos)):
        return usual
    ids = (field for field in VIDEO_IDS if isinstance(record.get(field), str) and record[field])
    return replace(usual, videos=(*VIDEO_FIELDS, *[*ids][:1]))


def swift_draft(record: dict[str, Any], base: str) -> Draft:
    """`query` and `response`, with the `history` before -> a draft; SampleError."""
    messages = system_turn(record, _SWIFT) + history_turns(record.get("history"), "history")
    messages += turn(record.get("query"), record.get("response"), "query, response")
    return with_media(messages, record, base, _SWIFT)


def _objects(record: Mapping[str, Any], name: str, needs: str) -> list[dict[str, Any]]:
    pairs = record.get(name)
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        detail = f"{name}: {pairs!r:.80}: expected a list of objects with {needs}"
        raise SampleError("bad_schema", detail)
    if not pairs:
        raise SampleError("missing_text", f"{name}: there is no question with its answer")
    return pairs


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
