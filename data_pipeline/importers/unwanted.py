"""Records that are rejected for what they say beside their messages: preferences, answers that are
not to be learned, choices, media under a name that is not known."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Any

from data_pipeline.importers.draft import as_list, media_type, names_medium, surely_medium
from data_pipeline.schema import SampleError

_CHOICES = (
    "chosen", "rejected", "chosen_messages", "rejected_messages", "negative_messages",
    "rejected_response",
)  # fmt: skip
_VERDICTS = ("label", "kto_tag")
# Each says of an assistant's turn, or of a record, whether it is learned.
LEARN_FLAGS = (
    "loss", "weight", "train", "training", "train_on_turn", "trainable", "loss_scale", "learn",
)  # fmt: skip
_REFUSING = frozenset((*_CHOICES, *_VERDICTS, *LEARN_FLAGS))
# In a record without an answer these fields are a class, a metric, a sampling weight, a split.
_OF_PLAIN = frozenset({"label", "loss", "weight", "train", "training"})


def refuse_unwanted(record: Mapping[str, Any], plain: bool = False) -> None:
    """SampleError for a record that says which of two answers is better, that one is bad, or that
    it is not to be learned.

    plain: the record is a text or a caption, and has no answer.
    """
    if _REFUSING.isdisjoint(record):
        return
    if plain:
        record = {name: value for name, value in record.items() if name not in _OF_PLAIN}
    for name in _CHOICES:
        if record.get(name):
            raise SampleError("preference_data", f"{name}: preferences cannot be imported")
    for name in _VERDICTS:
        # A label of 0 may be a class.
        if _is_false(record.get(name), zero=name == "kto_tag"):
            raise SampleError("preference_data", f"{name} is false: an answer not to be given")
    for name in LEARN_FLAGS:
        if _is_false(record.get(name), zero=True):
            detail = f"{name} is {record[name]!r}: a record that is not to be learned"
            raise SampleError("no_labels", detail)


_OFFERED = (
    "choices", "options", "multiple_choices", "candidates", "mc_choices", "answer_choices",
)  # fmt: skip
# Fields of which each has one choice: A (MMBench), a0 (NExT-QA), choice_a (SEED), `option 0`.
_ONE_CHOICE = re.compile(
    r"[A-H]|(?:a|opt|option|choice|candidate)[ _-]?(?:\d|[a-h])", re.IGNORECASE
)


def refuse_choices(record: Mapping[str, Any]) -> None:
    """SampleError for a question with choices: its answer may be the letter or number of one."""
    each = [n for n in record if _ONE_CHOICE.fullmatch(str(n)) and record[n] not in (None, "")]
    media_fields = [name for name in _OFFERED if names_medium(record.get(name))]
    if media_fields or len(each) > 1:
        detail = "a question with choices: write them into it, and the answer as it is to be said"
        raise SampleError("bad_schema", f"{', '.join(media_fields or each)}: {detail}")


def _is_false(value: Any, zero: bool) -> bool:
    """Whether a field of JSON, or of a table, says no."""
    if isinstance(value, str):
        return value.strip().lower() in (("false", "0", "0.0") if zero else ("false",))
    return value is False or (zero and isinstance(value, int | float) and value == 0)


_MEDIA_NAME = re.compile(
    r"(?:img|image|picture|photo|video|vid|clip|media|frame)s?(?:[ _-]?(?:path|file|name|url)s?)?",
    re.IGNORECASE,
)


def refuse_unread_media(
    record: Mapping[str, Any], known: Container[str], marked: bool, mend: str
) -> None:
    """SampleError where a field that a form does not know names a picture or video, by its suffix,
    in a record that would be text.

    marked: a question has a mark for it; else the field's name says what it is.
    """
    for name, value in record.items():
        by_name = _MEDIA_NAME.fullmatch(str(name)) is not None
        if name in known or not (marked or by_name):
            continue
        is_one = media_type if by_name else surely_medium
        named = [one.get("path") if isinstance(one, dict) else one for one in as_list(value)]
        if any(isinstance(path, str) and is_one(path) for path in named):
            detail = f"{name}: {value!r:.80}: names a medium, and is not read: {mend}"
            raise SampleError("missing_file", detail)
