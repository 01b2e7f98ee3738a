"""Records of questions and answers with their seconds, to real-time drafts.

`streamo`: `question[]`, `response[]` with `st_time`, `end_time` or `time`, where second n means the
frame that is on screen from n - 1 on. `joyai`: the same fields with `time` alone, where second n
means the frame at n. `frames`: what the converters of both make of them, a turn for each frame that
is answered by `</Silence>`, `</Standby>` or `</Response> text`. `livechat`: VideoLLM-online's
`conversation`, whose messages have a `time`. Standing by is silence here.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

from data_pipeline.importers.draft import (
    IMAGE_FIELDS,
    Draft,
    Medium,
    medium,
    role_of,
    unused_fields,
)
from data_pipeline.importers.timeline import TimedText, Timeline, order_notes, second_of
from data_pipeline.importers.unwanted import LEARN_FLAGS, refuse_unwanted
from data_pipeline.schema import SampleError

INSTRUCTION = "Describe what happens, as it happens."
# Under which names a record has its clip, the likeliest first.
CLIP_FIELDS = ("video_path", "video", "videos", "video_name", "video_uid", "video_id", "path")
_EVENT_FIELDS = ("question", "response", "duration")
_ABOUT = ("task_type", "source")  # said of a record, and no part of its conversation
# The fields of an event, and of a turn.
_TIMED = ("content", "time", "st_time", "end_time", *LEARN_FLAGS)
_LIVE = ("conversation", "conversations", "messages")  # VideoLLM-online's, those of chats
# Of a chat, which have no place in a stream.
_CHAT_ALONE = (*IMAGE_FIELDS, "tools", "functions", "audio", "audios")
_CHAT_MARK = re.compile(r"\s*(?:<(?:video|image)>|<\|video\|>)\s*")
_TIMES = ("time", "timestamp")
_TURN = ("role", "from", "content", "value", *_TIMES, *LEARN_FLAGS)
_STATE = re.compile(r"\s*</(silence|standby|response)>\s*", re.IGNORECASE)
_FRAME = re.compile(r"\s*<(stream|image)>\s*")
_STAMP = re.compile(r"\s*<([\d.]+)(?:s-[\d.]+s| seconds)>\s*")


def clip_of(record: dict[str, Any], base: str) -> Medium:
    """The clip that a record names; SampleError where it names none."""
    for name in CLIP_FIELDS:
        value = record.get(name)
        if isinstance(value, list):
            if len(value) > 1:
                raise SampleError("several_clips", f"{name}: {len(value)} videos: a stream has one")
            value = value[0] if value else None
        if value:
            return medium("video", value, base)
    raise SampleError("missing_file", f"no video is named: one of {', '.join(CLIP_FIELDS)}")


def streamo_draft(record: dict[str, Any], base: str) -> Draft:
    """Streamo's raw record -> a draft."""
    return _events_draft(record, base, before=1)


def joyai_draft(record: dict[str, Any], base: str) -> Draft:
    """JoyAI-VL-Interaction's record -> a draft."""
    return _events_draft(record, base, before=0)


def _events_draft(record: dict[str, Any], base: str, before: int) -> Draft:
    """`before`: seconds from the start of a frame to the number that names it."""
    notes = unused_fields(record, {*CLIP_FIELDS, *_EVENT_FIELDS, *_ABOUT})
    questions = []
    for i, entry in enumerate(_entries(record, "question", _TIMED, notes)):
        second = second_of(_time(entry, "time", 0), f"question[{i}].time")
        questions.append(TimedText(max(0.0, math.floor(second) - before), _text(entry)))
    answers, spans = [], []
    for i, entry in enumerate(_entries(record, "response", _TIMED, notes)):
        if not _text(entry).strip():
            notes.append("response without a text, left out")
            continue
        second, span = _second_and_span(entry, f"response[{i}]", before)
        answers.append(TimedText(second, _text(entry)))
        spans += [span] if span else []
    if any(later[0] < earlier[1] for earlier, later in pairwise(sorted(spans))):
        notes.append("responses whose times overlap")
    if any(not question.text.strip() for question in questions):
        raise SampleError("missing_text", "question: one has no content")
    if not questions:
        questions = [TimedText(0.0, INSTRUCTION)]
        notes.append("no question: an instruction put before the first frame")
    if not answers:
        notes.append("no answer: silence throughout")
    notes += order_notes(questions, "questions") + order_notes(answers, "responses")
    timeline = Timeline(tuple(questions), tuple(answers))
    return Draft([], [clip_of(record, base)], "realtime", notes=tuple(notes), timeline=timeline)


def _entries(
    record: dict[str, Any], name: str, known: tuple[str, ...], notes: list[str]
) -> list[dict[str, Any]]:
    """The objects of a list, with a note for each field that is not known; SampleError.

    An answer that is context alone has no place in a stream, whose turns are learned whole.
    """
    entries = record.get(name)
    entries = [entries] if isinstance(entries, dict) else entries
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SampleError("bad_schema", f"{name}: {entries!r:.80}: expected a list of objects")
    for i, entry in enumerate(entries):
        if name != "question" and role_of(entry.get("role", "assistant")) == "assistant":
            try:
                refuse_unwanted(entry)
            except SampleError as error:
                raise SampleError(error.reason, f"{name}[{i}].{error.detail}") from None
        notes += unused_fields(entry, known, f"{name}[].")
    return entries


def _text(entry: dict[str, Any], field: str = "content") -> str:
    content = entry.get(field)
    if not isinstance(content, str | None):
        raise SampleError("bad_schema", f"{field}: {content!r:.80} is not a text")
    return content or ""


def _time(entry: dict[str, Any], name: str, default: Any = None) -> Any:
    value = entry.get(name)
    return default if value is None or value == "" else value


def _second_and_span(
    entry: dict[str, Any], field: str, before: int
) -> tuple[float, tuple[float, float] | None]:
    """The second of the frame after which an answer is given, and the event's start and end."""
    start, end = _time(entry, "st_time"), _time(entry, "end_time")
    if start is not None and end is not None:
        first, last = second_of(start, f"{field}.st_time"), second_of(end, f"{field}.end_time")
        if last < first:
            raise SampleError("bad_time", f"{field}: it ends at {last:g} s, before {first:g} s")
        return float(math.ceil(max(last, before))), (first, last)
    time = _time(entry, "time", end)
    if time is None:
        raise SampleError("bad_time", f"{field}: neither time nor st_time and end_time")
    return max(0.0, math.ceil(second_of(time, f"{field}.time")) - before), None


def is_by_frames(record: dict[str, Any]) -> bool:
    """Whether a conversation has a turn for each frame."""
    messages = record.get("messages")
    answers = [
        message["content"]
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict)
        and role_of(message.get("role")) == "assistant"
        and isinstance(message.get("content"), str)
    ]
    return bool(answers) and all(_STATE.match(answer) for answer in answers[:3])


def frames_draft(record: dict[str, Any], base: str) -> Draft:
    """A conversation with a turn for each frame -> a draft."""
    known = {*CLIP_FIELDS, *_ABOUT, "messages", "images"}
    notes = unused_fields(record, known)
    system = ""
    questions: list[TimedText] = []
    answers: list[TimedText] = []
    seconds: list[float] = []
    for i, message in enumerate(_entries(record, "messages", _TURN, notes)):
        role, content = role_of(message.get("role")), _text(message)
        if role == "system":
            foreign = "</Silence>" in content or "</silence>" in content
            system = "" if foreign else content
            notes += ["system prompt of another protocol, left out"] if foreign else []
        elif role == "user":
            question, second = _question_and_second(content, f"messages[{i}]", len(seconds))
            if seconds and second <= seconds[-1]:
                raise SampleError(
                    "bad_time", f"messages[{i}]: {second:g} s after {seconds[-1]:g} s"
                )
            seconds.append(second)
            questions += [TimedText(second, question)] if question else []
        elif role == "assistant":
            answer = _answer(content, f"messages[{i}]")
            answers += [TimedText(seconds[-1] if seconds else 0.0, answer)] if answer else []
        else:
            raise SampleError("bad_schema", f"messages[{i}].role: {message.get('role')!r}")
    questions = _without_repeat(questions, answers, notes)
    if not questions:
        questions = [TimedText(seconds[0] if seconds else 0.0, INSTRUCTION)]
        notes.append("no question: an instruction put before the first frame")
    media, pictures = _frames_media(record, base, len(seconds))
    if not seconds:
        raise SampleError("mark_media_mismatch", "no turn shows a frame: <stream> or <image>")
    timeline = Timeline(
        tuple(questions), tuple(answers), system, frames=tuple(seconds), pictures=pictures
    )
    return Draft([], media, "realtime", notes=tuple(notes), timeline=timeline)


def _question_and_second(content: str, field: str, frames: int) -> tuple[str, float]:
    """What the user says in the turn of a frame, and the frame's second."""
    if len(_FRAME.findall(content)) != 1:
        raise SampleError("mark_media_mismatch", f"{field}: not one <stream> or <image> mark")
    stamp = _STAMP.search(content)
    second = second_of(stamp[1], field) if stamp else float(frames)
    return _FRAME.sub("\n", _STAMP.sub("\n", content)).strip(), second


def _answer(content: str, field: str) -> str:
    state = _STATE.match(content)
    if state is None:
        raise SampleError(
            "bad_schema", f"{field}: {content!r:.60}: no </Silence>, </Standby> or </Response>"
        )
    text = content[state.end() :].strip()
    return text if state[1].lower() == "response" else ""


def _without_repeat(
    questions: list[TimedText], answers: list[TimedText], notes: list[str]
) -> list[TimedText]:
    """Streamo's converter asks the first question at the first frame, too."""
    twice = len(questions) > 1 and questions[0].text == questions[1].text
    if not twice or any(answer.second < questions[1].second for answer in answers):
        return questions
    notes.append("question repeated at the first frame, asked once")
    return questions[1:]


def _frames_media(record: dict[str, Any], base: str, frames: int) -> tuple[list[Medium], bool]:
    """The pictures of the frames, or the clip that they are of."""
    images = record.get("images")
    if not images:
        return [clip_of(record, base)], False
    if not isinstance(images, list) or len(images) != frames:
        count = len(images) if isinstance(images, list) else 1
        raise SampleError("mark_media_mismatch", f"{frames} frames, {count} images")
    return [medium("image", image, base) for image in images], True


def is_livechat(record: dict[str, Any]) -> bool:
    """Whether a record of a clip has messages with seconds."""
    field = _live_messages(record)
    turns = [turn for turn in record[field] if not _is_system(turn)] if field else []
    if field == _LIVE[0]:  # whose times may be wrong
        return bool(turns) and all(
            isinstance(turn, dict) and ("time" in turn or _second(turn) is not None)
            for turn in turns[:3]
        )
    texts = [_message_text(turn) for turn in turns]
    if None in texts or None in map(_second, turns[:3]):
        return False
    marks = sum(len(_CHAT_MARK.findall(text)) for text in texts if text)
    return marks <= 1 and any(map(_second, turns))  # times that are all 0 say nothing


def _is_system(turn: Any) -> bool:
    return isinstance(turn, dict) and role_of(turn.get("role", turn.get("from"))) == "system"


def _live_messages(record: dict[str, Any]) -> str | None:
    """Where a record has its messages; those of chats need one clip beside them, and nothing else
    that a stream cannot show."""
    chat = _names_one_clip(record) and not any(record.get(name) for name in _CHAT_ALONE)
    names = _LIVE if chat else _LIVE[:1]
    return next((name for name in names if isinstance(record.get(name), list)), None)


def _names_one_clip(record: dict[str, Any]) -> bool:
    """`path` may be that of the record."""
    clips = [record[name] for name in CLIP_FIELDS if name != "path" and record.get(name)]
    return bool(clips) and not (isinstance(clips[0], list) and len(clips[0]) > 1)


def _message_text(turn: Any) -> str | None:
    """What a message says; None: it is a list of parts, or a call of a tool."""
    text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    return text if isinstance(text, str) else None


def _second(turn: dict[str, Any]) -> float | None:
    """The second of a message; None: it has none, or a date."""
    value = next((turn[name] for name in _TIMES if name in turn), None)
    try:
        return second_of(value, "time")
    except SampleError:
        return None


def livechat_draft(record: dict[str, Any], base: str) -> Draft:
    """VideoLLM-online's dialogue -> a draft; also one whose messages are named as those of chats
    are, with their seconds beside them."""
    field = next((name for name in _LIVE if isinstance(record.get(name), list)), _LIVE[0])
    notes = unused_fields(record, {*CLIP_FIELDS, *_ABOUT, field, "duration", "system"})
    questions: list[TimedText] = []
    answers: list[TimedText] = []
    system = _text(record, "system")
    for i, message in enumerate(_entries(record, field, _TURN, notes)):
        role = role_of(message.get("role", message.get("from")))
        text = _text(message, "content" if "content" in message else "value")
        if role == "system" and not system and not questions and not answers:
            system = text
            continue
        time = next((message[name] for name in _TIMES if name in message), None)
        second = second_of(time, f"{field}[{i}].time")
        if role not in ("user", "assistant") or not text.strip():
            raise SampleError("bad_schema", f"{field}[{i}]: {message!r:.80}")
        if role == "user" and field != _LIVE[0]:
            text = _CHAT_MARK.sub("", text)  # the clip is shown second by second
        (questions if role == "user" else answers).append(TimedText(second, text))
    if not questions:
        raise SampleError("missing_text", f"{field}: the user asks nothing")
    notes += order_notes(questions, "questions") + order_notes(answers, "answers")
    timeline = Timeline(tuple(questions), tuple(answers), system)
    return Draft([], [clip_of(record, base)], "realtime", notes=tuple(notes), timeline=timeline)


def names_clip(record: dict[str, Any]) -> bool:
    return any(record.get(name) for name in CLIP_FIELDS)
