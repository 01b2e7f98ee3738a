"""ZeroBench's subquestions from the TSV that VLMEvalKit reads, with its prompt and its scoring."""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import re
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.evaluate.harness.ask import Asking, RequestFailed, answer, each
from inference.evaluate.results import BenchmarkError, Item, ItemFile

# VLMEvalKit 00b1c8d, vlmeval/dataset/image_vqa.py, class ZEROBench.
PROMPT = (
    "{question} \n\n\nLet's think step by step and give the final answer in curly braces,"
    "  like this: {{final answer}}"
)
_BRACES = re.compile(r"\{(.*?)\}")
_LONGEST_REFERENCE = 64  # characters of an image that is another row's index


@dataclass(frozen=True)
class Question:
    """A line. images: their bytes in base64; empty: there is none."""

    index: str
    text: str
    answer: str
    images: tuple[str, ...]


def read_tsv(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, the first `limit` of them.

    Raises BenchmarkError that names a missing file, column, or index.
    """
    csv.field_size_limit(sys.maxsize)  # an image is a field
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: cannot be read: {error}") from None
    columns = set(rows[0]) if rows else set()
    wanted = "answers" if "answers" in columns else "answer"
    lacks = sorted({"index", "image", "question", wanted} - columns)
    if lacks:
        raise BenchmarkError(f"{path}: has no column {', '.join(lacks)}: give VLMEvalKit's TSV")
    images = {row["index"]: row["image"] or "" for row in rows}
    if len(images) < len(rows):
        raise BenchmarkError(f"{path}: an index stands there twice")
    return [
        Question(row["index"], row["question"], row[wanted], _images(row["image"] or "", images))
        for row in rows[:limit]
    ]


def _images(text: str, others: dict[str, str]) -> tuple[str, ...]:
    """Base64, a list of it as Python writes one, or the index of a row whose image is meant."""
    if 0 < len(text) <= _LONGEST_REFERENCE:
        text = others.get(text, "")
    if text.startswith("["):
        return tuple(ast.literal_eval(text))
    return (text,) if text else ()


def is_right(said: str, wanted: str) -> bool:
    """Whether the last thing in braces holds the reference. Without braces an answer is wrong."""
    found = _BRACES.findall(said.strip().lower())
    return bool(found) and wanted.strip().lower() in found[-1]


def ask(
    questions: list[Question], file: ItemFile, asking: Asking, concurrency: int, row: str
) -> Generator[Item, None, None]:
    """Asks what the file has not, and adds each item to it when it is done."""

    def one(question: Question) -> Item:
        item: dict[str, Any] = {
            "id": question.index, "row": row, "question": question.text,
            "reference": question.answer, "media": [],
        }  # fmt: skip
        parts = [_part(image) for image in question.images]
        if not parts or None in parts:
            return item | {"skipped": "no media"}
        asked = {"type": "text", "text": PROMPT.format(question=question.text)}
        try:
            said = answer(asking, [*(p for p in parts if p), asked])
        except RequestFailed as error:
            return item | {"failed": str(error)}
        right = is_right(said, question.answer)
        return item | {"answer": said, "correct": right, "score": float(right)}

    todo = [question for question in questions if question.index not in file]
    with closing(each(todo, one, concurrency)) as found:
        for item in found:
            file.add(item)
            yield item


def _part(image: str) -> dict[str, Any] | None:
    """A picture as a part of a message; None where it is not base64."""
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not data:
        return None  # the server looks at the bytes for what they are
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}
