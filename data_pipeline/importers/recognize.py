"""Which form a record has, and which forms are nearest to one that has none.

A form of your own is a line in `RULES`, with the fields that an error names where it is nearly met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.importers import (
    captions,
    conversation,
    pairs,
    published,
    segments,
    speech,
    streaming,
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A form of records: its name, what has it, and sets of fields of which it needs one."""

    form: str
    test: Callable[[Record], bool]
    needs: tuple[tuple[str, ...], ...]


def _events(record: Record) -> bool:
    return all(isinstance(record.get(name), list | dict) for name in ("question", "response"))


def _with_spans(record: Record) -> bool:
    responses = record.get("response")
    responses = [responses] if isinstance(responses, dict) else responses or []
    return _events(record) and any(
        isinstance(response, dict) and "st_time" in response for response in responses
    )


def _spoken(record: Record) -> bool:
    return speech.words_field(record) is not None and streaming.names_clip(record)


def _pair(record: Record) -> bool:
    """A text or caption beside a pair may be what its question is about, or the pair as a text."""
    of_its_own = isinstance(record.get("text"), str) or captions.has_captions(record)
    return pairs.looks_like_pair(record) and not of_its_own


# The first that fits is a record's form: the narrower ones stand before the wider ones.
RULES: tuple[Rule, ...] = (
    Rule("realtime-qa", segments.has_frame_timestamps, (("messages", "video"),)),
    Rule("moss-vl", segments.has_segments, (("messages", "videos"), ("conversations", "videos"))),
    Rule("moss-vl", segments.has_prompt, (("prompt", "response"),)),
    Rule("streamo-stream", streaming.is_by_frames, (("messages", "videos"),)),
    Rule("speech", speech.has_text_stream, (("messages",),)),
    Rule("streamo", _with_spans, (("question", "response", "video_path"),)),
    Rule("joyai", _events, (("question", "response", "video_path"),)),
    Rule("livechat", streaming.is_livechat, (("conversation", "video_uid"),)),
    Rule("sharegpt", conversation.looks_like_one, (("messages",), ("conversations",))),
    Rule("cauldron", pairs.looks_like_cauldron, (("texts",),)),
    Rule("ms-swift", pairs.looks_like_swift, (("query", "response"),)),
    Rule("moments", published.looks_like_moments, (("timestamps", "sentences", "video"),)),
    Rule("speech", _spoken, tuple((name, "video") for name in ("words", "segments", "content"))),
    Rule("narrations", speech.looks_like_narrations, (("narrations", "video_uid"),)),
    Rule("alpaca", lambda record: "instruction" in record, (("instruction", "output"),)),
    Rule("vqa", published.looks_like_vqa,
         tuple(("question", "answer", shown) for shown in ("image", "video"))),
    Rule("videochat", pairs.looks_like_videochat, (("QA", "video"),)),
    Rule("webvid", published.looks_like_webvid, (("videoid", "name"),)),
    Rule("pairs", _pair, (("question", "answer"), ("input", "output"))),
    Rule("table", captions.looks_like_a_table,
         tuple((media, "caption") for media in captions.MEDIA_COLUMNS)),
    Rule("text", lambda record: "text" in record, (("text",),)),
)  # fmt: skip
# Records of these may stand in one file; of which of the last two they are, all of them tell.
_MIXED = frozenset(rule.form for rule in RULES) - {"alpaca", "pairs", "table", "text", "webvid"}
ALIKE = frozenset({"streamo", "joyai"})
_MAY_BE_PAGES = frozenset({"table", "text"})
_SHARE = 4  # one in so many records whose `url` is a picture's makes a table of texts with URLs


def form_of(record: Record) -> str | None:
    """A record's form; None: it has none that is known."""
    return next((rule.form for rule in RULES if rule.test(record)), None)


def form_of_all(records: Sequence[Record]) -> str | None:
    """The form of a file, by its first records."""
    forms = [form_of(record) for record in records]
    first = next(iter(forms), None)
    if first in _MAY_BE_PAGES and captions.may_have_origin(records[0]):
        # Some pages are called like pictures, and some pictures have a URL without a suffix.
        tables, texts = forms.count("table"), forms.count("text")
        return "table" if tables * _SHARE >= tables + texts else "text"
    return "streamo" if first in ALIKE and "streamo" in forms else first


def form_beside(record: Record, form: str) -> str:
    """The form of one record in a file of a form."""
    own = form_of(record)
    if own is None or own not in _MIXED or form not in _MIXED or {own, form} <= ALIKE:
        return form
    return own


def nearest(record: Record) -> str:
    """The forms that a record nearly has, and what it lacks for each."""
    lacking: dict[str, tuple[str, ...]] = {}
    scores: dict[str, float] = {}
    for rule in RULES:
        for needs in rule.needs:
            missing = tuple(name for name in needs if name not in record)
            score = 1 - len(missing) / len(needs) - 0.01 * len(missing)
            if score > scores.get(rule.form, -1.0):
                lacking[rule.form], scores[rule.form] = missing, score
    shared = [form for form in scores if scores[form] > 0]
    best = sorted(shared, key=lambda form: -scores[form])[:3] or ["sharegpt", "streamo", "table"]
    return "; ".join(
        f"{form} (missing: {', '.join(lacking[form])})" if lacking[form] else
        f"{form} (its fields are there, of another kind than it has)" for form in best
    )  # fmt: skip
