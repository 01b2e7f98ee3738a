"""Reads the options of a processor's call: each is known, or refused by its name.

A copy of this file is in every exported folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from transformers import GenerationConfig

GROUPS = ("text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs")
KNOWN = (
    "return_tensors", "padding", "max_length", "pad_to_multiple_of", "padding_side",
    "add_special_tokens", "video_fps", "video_min_frames", "video_max_frames",
)  # fmt: skip
# Options of transformers with the values that ask for nothing, and why others are not done.
NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "truncation": ((False, None, "do_not_truncate"), "a text that is cut loses marks of its media"),
    "stride": ((0, None), "texts are not cut"),
    "return_attention_mask": ((True, None), "padding has to be told apart"),
    "return_token_type_ids": ((False, None), "the model takes none"),
    "return_mm_token_type_ids": ((False, None), "the model takes none"),
    "return_overflowing_tokens": ((False, None), "texts are not cut"),
    "return_special_tokens_mask": ((False, None), "the model takes none"),
    "return_offsets_mapping": ((False, None), "the model takes none"),
    "return_length": ((False, None), "attention_mask says it"),
    "is_split_into_words": ((False, None), "a text is one string"),
    "split_special_tokens": ((False, None), "marks are special tokens"),
    "do_sample_frames": ((False, None), "video_fps, video_min_frames and video_max_frames do it"),
    "verbose": ((True, False, None), ""),
}
GENERATION = set(GenerationConfig().to_dict()) - {*KNOWN}
PADDINGS = (False, None, "do_not_pad", True, "longest", "max_length")


def read_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The options by name, checked; those in transformers' groups (`text_kwargs`, ...) are taken
    out of them.

    Raises:
        ValueError: one is unknown, not done, or has a value that is not allowed.
    """
    options: dict[str, Any] = {}
    for name, value in _ungrouped(kwargs):
        value = getattr(value, "value", value)  # of transformers' enumerations
        if name in NOT_DONE:
            neutral, why = NOT_DONE[name]
            if value not in neutral:
                raise ValueError(f"{name}={value!r}: not done: {why}")
        elif name not in KNOWN and name in GENERATION:
            raise ValueError(
                f"{name}: is an option of generate, not of this processor: in a pipeline's call, "
                f"generate_kwargs={{{name!r}: ...}}"
            )
        elif name not in KNOWN:
            near = get_close_matches(name, KNOWN, 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN)}"
            raise ValueError(f"{name}: is not an option of this processor: {hint}")
        elif name in options and options[name] != value:
            raise ValueError(f"{name}: is given as {options[name]!r} and as {value!r}")
        elif value is not None:
            options[name] = value
    _check_padding(options)
    _check_frames(options)
    _check(options, "return_tensors", (None, "pt", "np"))
    _check(options, "add_special_tokens", (None, True, False))
    return options


def _ungrouped(kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in kwargs.items():
        if name not in GROUPS:
            flat.append((name, value))
        elif isinstance(value, Mapping):
            flat += value.items()
        elif value is not None:
            raise ValueError(f"{name}={value!r}: must be a dict of options")
    return flat


def _check(options: dict[str, Any], name: str, allowed: Sequence[Any]) -> None:
    value = options.get(name)
    if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def _check_padding(options: dict[str, Any]) -> None:
    _check(options, "padding", PADDINGS)
    _check(options, "padding_side", (None, "left", "right"))
    padding, longest = options.get("padding"), options.get("max_length")
    for name in ("max_length", "pad_to_multiple_of"):
        value = options.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r}: must be a whole number of 1 or more")
    if padding == "max_length" and longest is None:
        raise ValueError("max_length: needed where padding='max_length'")
    if padding != "max_length" and longest is not None:
        raise ValueError(
            f"max_length={longest}: is what padding='max_length' pads to; longer texts are not cut"
        )
    if options.get("pad_to_multiple_of") and padding in (False, None, "do_not_pad"):
        raise ValueError("pad_to_multiple_of: needs padding=True")


def _check_frames(options: dict[str, Any]) -> None:
    for name in ("video_fps", "video_min_frames", "video_max_frames"):
        value = options.get(name)
        number = type(value) is int or (name == "video_fps" and type(value) is float)
        if value is not None and not (number and 0 < value < float("inf")):
            raise ValueError(f"{name}={value!r}: must be a number greater than 0")


def padded_length(lengths: Sequence[int], options: Mapping[str, Any]) -> int:
    """The number of tokens of each row after padding; 0: rows are not padded.

    Raises:
        ValueError: rows of unequal length are to be a tensor, or a row is longer than max_length.
    """
    padding = options.get("padding")
    if padding in (False, None, "do_not_pad"):
        if len(set(lengths)) > 1 and options.get("return_tensors"):
            raise ValueError("texts of unequal length need padding=True")
        return 0
    longest = max(lengths)
    if padding == "max_length":
        if longest > options["max_length"]:
            raise ValueError(
                f"max_length={options['max_length']}: text {list(lengths).index(longest)} has "
                f"{longest} tokens, and is not cut"
            )
        longest = options["max_length"]
    return longest + -longest % (options.get("pad_to_multiple_of") or 1)


def texts_of(text: Any) -> list[str]:
    """The texts of a call, as a batch. Raises ValueError for none, and for what is not a string."""
    if text is None:
        raise ValueError("text: needed, with a mark for each medium")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("text: an empty batch")
    for n, one in enumerate(texts):
        if not isinstance(one, str):
            raise ValueError(f"text[{n}]: is a {type(one).__name__}, it must be a string")
    return texts


def share(media: Any, counts: list[int], name: str) -> list[list[Any]]:
    """Divides media among the texts of a batch, as the texts' marks count them.

    Args:
        media: of one text: a list; of a batch: a list for each text (None: nothing), or one list
            that the marks of all texts go through. An array of one dimension more is a list.
        counts: marks of each text.
        name: images or videos; a video may be a list of pictures itself.

    Raises:
        ValueError: there are more or fewer than marks.
    """
    many = {"images": 4, "videos": 5}[name]
    if media is None:
        values = []
    elif isinstance(media, list | tuple) or getattr(media, "ndim", 0) == many:
        values = list(media)
    else:
        values = [media]
    rows = [[] if row is None else row for row in values]
    nested = all(isinstance(row, list | tuple) for row in rows)
    if nested and [len(row) for row in rows] == counts:
        return [list(row) for row in rows]
    lists = any(row is None or isinstance(row, list | tuple) for row in values)
    if (lists and name == "images") or len(values) != sum(counts) or None in _plain(values):
        found = [len(row) if isinstance(row, list | tuple) else 1 for row in rows]
        raise ValueError(
            f"{name}: the texts have {counts} marks, but {found if lists else len(values)} of it "
            "are given: one list, or a list for each text"
        )
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


def _plain(values: list[Any]) -> list[Any]:
    """The values without arrays, which cannot be compared."""
    return [one for one in values if not hasattr(one, "shape")]
