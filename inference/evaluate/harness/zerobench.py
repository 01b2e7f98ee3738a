"""ZeroBench's subquestions from the TSV that VLMEvalKit reads, with its prompt and its scoring."""

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
    """Base64, a list of it as Python writes one, or the index of a row whose image is meant."""
    if 0 < len(text) <= _LONGEST_REFERENCE:
        text = others.get(text, "")
    if text.startswith("["):
        try:
            return tuple(map(str, ast.literal_eval(text)))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # it is not base64, either
    return (text,) if text else ()


def is_right(said: str, wanted: str) -> bool:
    """Whether the last thing in braces holds the reference. Without braces an answer is wrong."""
    found = _BRACES.findall(said.strip().lower())
    return bool(found) and wanted.strip().lower() in found[-1]


def ask(
    questions: Sequence[Question],
    file: ItemFile,
    config: EndpointConfig,
    row: str,
    check: Callable[[], None],
) -> None:
    """Asks what the file has not, as many at once as the endpoint's `concurrency`, and adds each
    item to it when it is done. `check` is called meanwhile, and may raise.

    Raises BenchmarkError where the server cannot be asked at all.
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
        "media": [],
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
        said, _ = await endpoint.ask(request)
    except RequestFailed as error:
        return item | {"failed": str(error)}
    right = is_right(said, question.answer)
    return item | {"answer": said, "correct": right, "score": float(right)}


def _part(image: str) -> dict[str, Any] | None:
    """A picture as a part of a message; None where it is not base64."""
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not data:
        return None  # the server looks at the bytes for what they are
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}
