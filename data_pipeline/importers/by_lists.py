"""A JSON object that has the records of a set in lists beside each other, which belong together.

COCO's captions (`images`, `annotations`; in Karpathy's splits inside the `images`), MSR-VTT's
(`videos`, `sentences`), the questions of VQA sets (`questions`; their answers are in a file beside
it), and sets whose records are all under `data` (TextVQA, DocVQA). Of a large file one list at a
time is in memory, of COCO's pictures the names.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import ijson

from data_pipeline import files
from data_pipeline.importers.by_ids import FIELDS, line, list_alone, opened_json, until_damage
from data_pipeline.importers.published import answer_of
from data_pipeline.importers.recognize import form_of
from data_pipeline.schema import SampleError
from data_pipeline.shards import ShardError

_LIST = "start_array"
_LISTS = (("images", "annotations"), ("videos", "sentences"), ("questions",), ("annotations",))
_DATA, _IMAGES = "data", "images"
_HEAD = 1 << 16  # bytes by which a file is known as one of answers
# What is at a place of an object: `images.item` are the elements of a list.
Read = Callable[[str], Iterator[Any]]
Records = Iterator[dict[str, Any] | SampleError]


def lists_of(kinds: Mapping[str, str]) -> tuple[str, ...]:
    """The lists of an object that have its records; none: they are elsewhere.

    kinds: of each of its fields the event of ijson with which it begins.
    """
    own = {name for name, kind in kinds.items() if kind == _LIST}
    if own == {_DATA} and FIELDS.isdisjoint(kinds):
        return (_DATA,)
    others = FIELDS.intersection(own)
    if own == {_IMAGES} and {_IMAGES, "dataset"} == kinds.keys():
        return (_IMAGES,)
    return next((names for names in _LISTS if own >= {*names} >= others), ())


def in_lists(value: dict[str, Any], path: str) -> Records | None:
    """The records of an object that has them in lists; None: they are elsewhere. ShardError."""
    names = lists_of({name: _LIST if isinstance(v, list) else "" for name, v in value.items()})
    if names and _is_record(value, names):
        return None

    def read(place: str) -> Iterator[Any]:
        name, _, inside = place.partition(".")
        yield from value.get(name, []) if inside else filter(None, [value.get(name)])

    return _records(names, read, path) if names else None


def _is_record(value: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether an object is one record, which has fields of these names: annotations of its own."""
    if names[0] in ("images", "videos"):  # of a set each is an object with an id
        return not any(isinstance(one, dict) for one in value[names[0]])
    return form_of(value) is not None


def in_large_lists(path: str, names: tuple[str, ...], size: int) -> Iterator[tuple[Any, float]]:
    """As `in_lists`, of a file that is not read whole; with the share of its `size` bytes read so
    far. Ends, and raises ShardError, as `until_damage`."""
    at = 0

    def read(place: str) -> Iterator[Any]:
        nonlocal at
        with opened_json(path) as file:
            for element in ijson.items(file, place, use_float=True):
                at = file.tell()
                yield element

    shares = (
        (record, min(1.0, at / size) if size else 0.0) for record in _records(names, read, path)
    )
    return until_damage(shares, path)


def _records(names: tuple[str, ...], read: Read, path: str) -> Records:
    if names == (_DATA,):
        yield from read(f"{_DATA}.item")
    elif names == (_IMAGES,):
        yield from _split(read)
    elif names == ("questions",):
        yield from _questions(read, path)
    elif names == ("annotations",):
        raise _answers_alone(next(read("annotations.item"), None), path)
    else:
        media, texts = names
        yield from _captioned(media, texts, read, path)


def _captioned(media: str, texts: str, read: Read, path: str) -> Records:
    """COCO's pictures or MSR-VTT's videos, each once for each of its captions."""
    own, name_of = ("id", _picture) if media == "images" else ("video_id", _video)
    entries = (one for one in read(f"{media}.item") if isinstance(one, dict) and own in one)
    named = {str(one[own]): name_of(one) for one in entries}
    belongs = "image_id" if media == "images" else "video_id"
    for i, text in enumerate(read(f"{texts}.item")):
        if not isinstance(text, dict) or "caption" not in text:
            if not i:
                raise _no_captions(text, path)
            yield SampleError("missing_caption", f"{texts}[{i}]: {text!r:.80} has no caption")
        elif (number := str(text.get(belongs))) not in named:
            detail = f"{texts}[{i}].{belongs}: {number} is the {own} of none of the {media}"
            yield SampleError("missing_file", detail)
        else:
            yield {k: v for k, v in text.items() if k != belongs} | named[number]


def _split(read: Read) -> Records:
    """The pictures of Karpathy's splits of COCO and Flickr, each once for each of its sentences."""
    for i, image in enumerate(read(f"{_IMAGES}.item")):
        if not isinstance(image, dict) or not isinstance(image.get("sentences"), list):
            yield SampleError("missing_caption", f"images[{i}]: {image!r:.80} has no sentences")
            continue
        name = "/".join(str(image[part]) for part in ("filepath", "filename") if image.get(part))
        for sentence in image["sentences"]:
            caption = sentence.get("raw") if isinstance(sentence, dict) else sentence
            yield {"file_name": name, "caption": caption, "split": image.get("split")}


def _picture(image: dict[str, Any]) -> dict[str, Any]:
    """With the folder that COCO has the picture in, where the file says it."""
    name, url = image.get("file_name"), image.get("coco_url")
    if isinstance(url, str) and url.endswith(f"/{name}"):
        name = "/".join(url.split("/")[-2:])
    return {"file_name": name}


def _video(video: dict[str, Any]) -> dict[str, Any]:
    return {"video": video["video_id"], "split": video.get("split")}


def _no_captions(text: Any, path: str) -> ShardError:
    if isinstance(text, dict) and "question_id" in text:
        return _answers_alone(text, path)
    fields = ", ".join(text) if isinstance(text, dict) else repr(text)[:80]
    return ShardError(
        f"{path}: annotations[0] has no `caption`, but {fields}: of COCO's files those of captions "
        "are read (captions_*.json)"
    )


def _answers_alone(text: Any, path: str) -> ShardError:
    if not isinstance(text, dict) or "question_id" not in text:
        return ShardError(f"{path}: {list_alone('annotations')}")
    return ShardError(
        f"{path}: annotations[0] has a question_id and no `question`: give the file of the "
        "questions, *questions.json, which finds its answers beside it"
    )


def _questions(read: Read, path: str) -> Records:
    """Each question with its picture and its answer."""
    kind, part = (next(read(name), None) for name in ("data_type", "data_subtype"))
    answers: dict[str, str] | None = None
    for i, question in enumerate(read("questions.item")):
        if not isinstance(question, dict) or any(n in question for n in ("answer", "answers")):
            yield question
            continue
        if answers is None:
            answers = _answers(path)
        own, number = str(question.get("question_id")), question.get("image_id")
        answer = answers.get(own)
        if answer is None:
            detail = f"questions[{i}].question_id: {own} has no answer in {answers_path(path)}"
            yield SampleError("missing_text", detail)
        elif kind != "mscoco" or not isinstance(part, str) or not isinstance(number, int):
            yield question | {"answer": answer}
        else:
            image = f"{part}/COCO_{part}_{number:012d}.jpg"
            rest = {name: value for name, value in question.items() if name != "image_id"}
            yield rest | {"image": image, "answer": answer}


def answers_path(path: str) -> str | None:
    """Where the answers to the questions of a file are, as VQAv2 and OK-VQA name theirs."""
    name = files.name(path)
    if "questions" not in name:
        return None
    own = name.replace("questions", "annotations").replace("OpenEnded_", "")
    return files.join(files.parent(path), own)


def answers_beside(paths: Iterable[str]) -> tuple[str, ...]:
    """The files that the answers to the questions of others are read from, where they are there."""
    there = []
    for path in filter(None, map(answers_path, paths)):
        with suppress(ShardError):  # told when a question needs it
            files.file_size(path)
            there.append(path)
    return tuple(there)


def answers_among(paths: Iterable[str]) -> frozenset[str]:
    """Of files those that have the answers to the questions of others, and no records."""
    there = frozenset(paths).intersection(filter(None, map(answers_path, paths)))
    return frozenset(filter(_has_answers, there))


def _has_answers(path: str) -> bool:
    with opened_json(path) as file:
        head = io.BytesIO(file.read(_HEAD))
    with suppress(ijson.JSONError):  # it is cut off, or no JSON, which is told when it is read
        return any(at == "annotations.item.question_id" for at, _, _ in ijson.parse(head))
    return False


def _answers(path: str) -> dict[str, str]:
    """The answers in the file beside one of questions, by the questions' ids; ShardError."""
    beside = answers_path(path)
    if beside is None:
        raise ShardError(f"{path}: its questions have no answers: call it *questions.json, and "
                         "their answers beside it *annotations.json")  # fmt: skip
    try:
        with opened_json(beside) as file:
            found = ijson.items(file, "annotations.item", use_float=True)
            return {str(one.get("question_id")): answer_of(one) or "" for one in found}
    except (ShardError, OSError) as error:
        raise ShardError(f"{path}: its questions have no answers: they are expected in {beside}: "
                         f"{error}") from None  # fmt: skip
    except (ijson.JSONError, AttributeError) as error:  # an element that is no object
        raise ShardError(f"{beside} cannot be read: {line(error)}") from None
