"""Asks ZeroBench's subquestions, from VLMEvalKit's TSV, with its prompt and its scoring."""

from __future__ import annotations

import ast
import asyncio
import base64
import binascii
import csv
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipeline.commands import one_line
from data_pipeline.synthesis.config import EndpointConfig
from data_pipeline.synthesis.endpoint import Endpoint, EndpointError, RequestFailed
from data_pipeline.synthesis.prompts import Request
from inference.evaluate.results import BenchmarkError, Item, ItemFile

# VLMEvalKit 00b1c8d, vlmeval/dataset/image_vqa.py, class ZEROBench.
PROMPT = (
    "{question} \n\n\nLet's think step by step and give the final answer in curly braces,"
    "  like this: {{final answer}}"
)
_BRACES = re.compile(r"\{(.*?)\}")
_LOOK = 1.0  # seconds between looks at whether the server lives
_LONGEST_REFERENCE = 64  # an image of at most so many characters is the index of another row


@dataclass(frozen=True)
class Question:
    """A line of the TSV. images: in base64."""

    index: str
    text: str
    answer: str
    images: tuple[str, ...]


def read_tsv(path: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file, or all.

    Raises BenchmarkError, which names the file and what is missing.
    """
    csv.field_size_limit(sys.maxsize)  # an image is a field
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, delimiter="\t")
            rows, columns = list(table), set(table.fieldnames or ())
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise BenchmarkError(f"{path}: cannot be read: {one_line(error)}") from None
    wanted = "answers" if "answers" in columns else "answer"
    lacks = sorted({"index", "image", "question", wanted} - columns)
    if lacks:
        raise BenchmarkError(f"{path}: has no column {', '.join(lacks)}: give VLMEvalKit's TSV")
    if not rows:
        raise BenchmarkError(f"{path}: has no questions")
    for number, row in enumerate(rows, 1):
        if None in (row["index"], row["question"], row[wanted]):
            raise BenchmarkError(f"{path}: question {number}: the line has too few columns")
    images = {row["index"]: row["image"] or "" for row in rows}
    if len(images) < len(rows):
        raise BenchmarkError(f"{path}: an index stands there twice")
    return [
        Question(row["index"], row["question"], row[wanted], _images(row["image"] or "", images))
        for row in rows[:limit]
    ]


def _images(text: str, others: dict[str, str]) -> tuple[str, ...]:
    """The images of a row's field, which is base64, a Python list of such texts, or the index of
    another row with the image."""
    if 0 < len(text) <= _LONGEST_REFERENCE:
        text = others.get(text, "")
    if text.startswith("["):
        try:
            return tuple(map(str, ast.literal_eval(text)))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # kept as one text, which _part then refuses: it is not base64
    return (text,) if text else ()


def is_right(answer: str, reference: str) -> bool:
    """Whether the last text in braces contains the reference. Without braces it is wrong."""
    found = _BRACES.findall(answer.strip().lower())
    return bool(found) and reference.strip().lower() in found[-1]


def ask(
    questions: Sequence[Question],
    file: ItemFile,
    config: EndpointConfig,
    row: str,
    check: Callable[[], None],
) -> None:
    """Asks the questions that the file has no item of, `concurrency` of them at a time, and adds
    each item to it when it is done. `check` is called meanwhile, and may raise.

    Raises BenchmarkError where no request can succeed.
    """
    todo = [question for question in questions if question.index not in file]

    async def ask_all() -> None:
        endpoint = Endpoint(config, lambda kind, tokens: None)
        waiting = {asyncio.create_task(_item(question, endpoint, config, row)) for question in todo}
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=_LOOK, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    file.add(task.result())
                check()
        except EndpointError as error:
            raise BenchmarkError(str(error)) from None
        finally:
            await endpoint.close()

    asyncio.run(ask_all())


async def _item(question: Question, endpoint: Endpoint, config: EndpointConfig, row: str) -> Item:
    item: Item = {
        "id": question.index, "row": row, "question": question.text, "reference": question.answer,
        "media": [], "pictures": [sha256(one.encode()).hexdigest()[:16] for one in question.images],
    }  # fmt: skip
    parts = [_part(image) for image in question.images]
    if not parts or None in parts:
        return item | {"skipped": "no media"}
    text = {"type": "text", "text": PROMPT.format(question=question.text)}
    content = (*(part for part in parts if part), text)
    request = Request(
        row, config.url, config.model, "", content, None, None, config.temperature,
        config.max_tokens, 0, question.index, 0,
    )  # fmt: skip
    try:
        answer, _ = await endpoint.ask(request)
    except RequestFailed as error:
        return item | {"failed": str(error)}
    right = is_right(answer, question.answer)
    return item | {"answer": answer, "correct": right, "score": float(right)}


def _part(image: str) -> dict[str, Any] | None:
    """A picture as a part of a message; None where it is not base64."""
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not data:
        return None
    # Whatever the format: the server recognizes it by the bytes.
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}
