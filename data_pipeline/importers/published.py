"""Records of published sets of pictures and videos, to drafts.

Questions about a picture or video and their answers (VQAv2, OK-VQA, TextVQA, DocVQA, GQA, ...),
captions of the moments of a video (ActivityNet Captions, YouCook2), and WebVid's rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.importers.captions import has_captions, table_draft
from data_pipeline.importers.conversation import Dialect, with_media
from data_pipeline.importers.draft import (
    IMAGE_FIELDS,
    VIDEO_FIELDS,
    VIDEO_IDS,
    Draft,
    as_list,
    media_type,
    medium,
    names_medium,
    unused_fields,
)
from data_pipeline.importers.marks import ANY_MARKS
from data_pipeline.importers.speech import WINDOW
from data_pipeline.importers.streaming import CLIP_FIELDS, INSTRUCTION, clip_of, names_clip
from data_pipeline.importers.timeline import TimedText, Timeline, order_notes, second_of
from data_pipeline.importers.unwanted import refuse_choices
from data_pipeline.schema import IMAGE_MARK, VIDEO_MARK, MediaType, SampleError

# Under which names a question has its picture or video; the last ones are names without a suffix.
_FILES = ("file_name", "image_filename", "file_path", "image_local_name")
_IMAGE_IDS = ("image_id", "imageId")
_MEDIA_FIELDS = (*IMAGE_FIELDS, *VIDEO_FIELDS, *_FILES, *_IMAGE_IDS, *VIDEO_IDS)
_ANSWERS = ("multiple_choice_answer", "answer", "answers")  # the likeliest first
_MOMENTS = ("annotations", "segments", "events")  # of a video; YouCook2's first
_PUBLISHED = frozenset({"segment", "sentence"})  # of a moment of YouCook2
_TEXT_FIELDS = ("sentence", "caption", "description")  # what is told of a moment
_LEAD = 2  # seconds that are watched before what the first caption of a window is about


def looks_like_vqa(record: Mapping[str, Any]) -> bool:
    answered = any(record.get(name) is not None for name in _ANSWERS)
    has_medium = answered and any(names_medium(record.get(name)) for name in _MEDIA_FIELDS)
    return has_medium and isinstance(record.get("question"), str)


def vqa_draft(record: dict[str, Any], base: str) -> Draft:
    """A question about a picture or video, and its answer -> a conversation; SampleError."""
    refuse_choices(record)
    question, answer = record.get("question"), answer_of(record)
    if not isinstance(question, str) or not question.strip():
        raise SampleError("missing_text", f"question: {question!r:.80} is not a text")
    if answer is None or not answer.strip():
        wrong = [f"{name} is {record[name]!r:.80}, which is no text" for name in _ANSWERS
                 if record.get(name) is not None]  # fmt: skip
        detail = f"no answer: {', '.join(wrong) or 'one of ' + ', '.join(_ANSWERS)}"
        raise SampleError("missing_text", detail)
    kind, name, media = _media_of(record)
    if not any(mark in question for mark in ANY_MARKS):
        question = (IMAGE_MARK if kind == "image" else VIDEO_MARK) * len(media) + question
    notes = unused_fields(record, {"question", name, *_ANSWERS})
    people = record.get("answers")
    if isinstance(people, list) and len(people) > 1:
        notes.append("several answers, of which the most frequent one is taken")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return with_media(turns, {f"{kind}s": media}, base, Dialect(messages="question"), notes)


def answer_of(record: Mapping[str, Any]) -> str | None:
    """The answer to a question, of several people's the most frequent, of these the first; None:
    there is none."""
    for name in _ANSWERS:
        value = record.get(name)
        replies = [one.get("answer") if isinstance(one, dict) else one for one in as_list(value)]
        texts = [one for one in replies if isinstance(one, str) and one.strip()]
        if texts:
            return Counter(texts).most_common(1)[0][0]
    return None


def _media_of(record: dict[str, Any]) -> tuple[MediaType, str, list[Any]]:
    """What a question is about: pictures or videos, the field that names them, their names."""
    name = next((name for name in _MEDIA_FIELDS if names_medium(record.get(name))), None)
    if name is None:
        fields = ", ".join((*_MEDIA_FIELDS[:3], *VIDEO_FIELDS[:3]))
        raise SampleError("missing_file", f"no picture or video is named: {fields}, ...")
    media = as_list(record[name])
    if name in (*_IMAGE_IDS, *VIDEO_IDS) and not all(isinstance(one, str) for one in media):
        detail = (
            f"{name}: {media[0]!r:.40} is no file's name: put the path under `image` or `video`"
        )
        raise SampleError("bad_schema", detail)
    kind: MediaType = "video" if name in (*VIDEO_FIELDS, *VIDEO_IDS) else "image"
    if name in _FILES:
        kind = media_type(str(media[0])) or kind
    return kind, name, media


def looks_like_moments(record: dict[str, Any]) -> bool:
    if all(isinstance(record.get(name), list) for name in ("timestamps", "sentences")):
        return True
    field = _moments_field(record)
    if field is None:
        return False
    if record[field][0].keys() >= _PUBLISHED:
        return True
    # A list of other names may tell more of a text, a question or a captioned video.
    more = looks_like_vqa(record) or has_captions(record) or "instruction" in record
    return names_clip(record) and not more


def _moments_field(record: Mapping[str, Any]) -> str | None:
    """The list of a record whose objects have a caption each, and its seconds."""
    for name in _MOMENTS:
        moments = record.get(name)
        first = moments[0] if isinstance(moments, list) and moments else None
        if not isinstance(first, dict) or _times(first) is None:
            continue
        # What has a `text`, too, is what is spoken.
        if first.keys() >= _PUBLISHED or (
            "text" not in first and any(n in first for n in _TEXT_FIELDS)
        ):
            return name
    return None


def _times(moment: Mapping[str, Any]) -> Any:
    """Start and end of a moment, as it has them; None: it has none."""
    pair = next((moment[name] for name in ("segment", "timestamp") if name in moment), None)
    both = [moment.get(name) for name in ("start", "end")]
    return both if pair is None and None not in both else pair


def moments_draft(record: dict[str, Any], base: str, window: float = WINDOW) -> list[Draft]:
    """Captions of the moments of a video -> drafts: each is said when its moment has ended."""
    known = {*CLIP_FIELDS, "duration", "timestamps", "sentences", _moments_field(record) or "",
             "subset", "recipe_type"}  # fmt: skip
    notes = unused_fields(record, known)
    spans = list(_spans(record, notes))
    if not spans:
        raise SampleError("missing_text", f"no caption is left: {', '.join(dict.fromkeys(notes))}")
    clip = (
        medium("video", _placed(record), base) if "recipe_type" in record else clip_of(record, base)
    )
    captions = [TimedText(end, text) for _, end, text in spans]
    notes += order_notes(captions, "captions")
    spans.sort(key=lambda span: span[1])
    if any(start < before[1] for (start, _, _), before in zip(spans[1:], spans, strict=False)):
        notes.append("captions whose times overlap")
    drafts: list[Draft] = []
    for inside in _windows(spans, window):
        start = max(0, math.floor(min(start for start, _, _ in inside)) - _LEAD)
        captions = [TimedText(end, text) for _, end, text in inside]
        question, end = TimedText(float(start), INSTRUCTION), math.ceil(captions[-1].second)
        timeline = Timeline(
            (question,), tuple(captions), start=float(start), end=float(end), late=True
        )
        drafts.append(Draft([], [clip], "realtime", notes=tuple(() if drafts else notes),
                            timeline=timeline))  # fmt: skip
    return drafts


def _placed(record: dict[str, Any]) -> str:
    """Where YouCook2 has a video: in a folder of its part and of its recipe."""
    parts = (record.get(name) for name in ("subset", "recipe_type", "video_uid"))
    return "/".join(str(part) for part in parts if part)


def _spans(record: dict[str, Any], notes: list[str]) -> Iterator[tuple[float, float, str]]:
    """Start, end and text of each caption that can be said."""
    times, texts = record.get("timestamps"), record.get("sentences")
    if not isinstance(times, list) or not isinstance(texts, list):
        moments = record.get(_moments_field(record) or _MOMENTS[0]) or []
        entries = [one if isinstance(one, dict) else {} for one in moments]
        times = [_times(one) for one in entries]
        texts = [
            next((one[name] for name in _TEXT_FIELDS if one.get(name)), None) for one in entries
        ]
    if len(times) != len(texts):
        raise SampleError("bad_schema", f"timestamps has {len(times)} entries, sentences "
                          f"{len(texts)}: each caption needs its [start, end]")  # fmt: skip
    for i, (time, text) in enumerate(zip(times, texts, strict=True)):
        try:
            start, end = (second_of(one, f"timestamps[{i}]") for one in time)
        except (SampleError, TypeError, ValueError):
            start, end = 1.0, 0.0
        if end < start:
            notes.append("caption with a bad time, left out")
        elif not isinstance(text, str) or not text.strip():
            notes.append("caption without a text, left out")
        else:
            yield start, end, text.strip()


def _windows(
    spans: list[tuple[float, float, str]], window: float
) -> Iterator[list[tuple[float, float, str]]]:
    """The captions, by their ends, in parts whose moments lie in so many seconds."""
    inside: list[tuple[float, float, str]] = []
    for span in spans:
        first = min([span[0], *(start for start, _, _ in inside)])
        if inside and span[1] - first > window - _LEAD:
            yield inside
            inside = []
        inside.append(span)
    yield inside


def looks_like_webvid(record: dict[str, Any]) -> bool:
    # A table of one's own names its files and has captions, which are not its names.
    return {"videoid", "name"} <= record.keys() and not has_captions(record)


def webvid_draft(record: dict[str, Any], base: str) -> list[Draft]:
    """WebVid's row -> a video and its caption; the video lies in its page's folder, or in none."""
    number, folder = record.get("videoid"), record.get("page_dir")
    if not isinstance(number, str | int) or not str(number).strip():
        raise SampleError("missing_file", "videoid is empty")
    path = "/".join(str(part) for part in (folder, f"{number}.mp4") if part)
    rest = {name: v for name, v in record.items() if name not in ("videoid", "page_dir", "name")}
    return table_draft(rest | {"video": path, "caption": record["name"]}, base, "video", "caption")
