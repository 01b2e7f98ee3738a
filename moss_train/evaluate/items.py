"""What is evaluated: samples with an answer, read from shards or from lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.batch import EncodedSample
from data_pipeline.commands import one_line
from data_pipeline.encode import SampleEncoder
from data_pipeline.importers.archive import DAMAGE
from data_pipeline.importers.webdataset import read_samples
from data_pipeline.schema import Sample, SampleError, described_by, parse_sample
from data_pipeline.shards import shard_files


class EvaluationError(ValueError):
    """Something that cannot be evaluated; the text names it and says what to do."""


@dataclass(frozen=True)
class AnswerKey:
    """What is known about a sample and its answer.

    source: what its scores are grouped by, such as `sft/video`.
    key: its name in messages and results.
    task: `caption`, `narrate`, or the kind of question.
    options: all possible answers; empty: free text.
    speech: real-time samples: (second, sentence) of what is to be said unasked.
    """

    source: str
    key: str
    sample: Sample
    task: str
    options: tuple[str, ...] = ()
    speech: tuple[tuple[int, str], ...] = ()

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.sample.messages[-1].content


@dataclass(frozen=True)
class Item(AnswerKey):
    """A sample that a model is asked about."""

    encode: Callable[[], EncodedSample] = field(kw_only=True)

    @cached_property
    def encoded(self) -> EncodedSample:
        """The sample as tensors, made when they are asked for first. Raises SampleError."""
        return self.encode()

    def answer_key(self) -> AnswerKey:
        """All but the tensors."""
        return AnswerKey(*(getattr(self, entry.name) for entry in fields(AnswerKey)))


def read_shards(
    folder: Path, source: str, encoder: SampleEncoder, limit: int | None = None
) -> Iterator[Item]:
    """The samples of a folder of shards in their order, the first `limit` of them.

    Raises EvaluationError that names a shard that is damaged, and SampleError.
    """
    samples = (sample for shard in shard_files(folder) for sample in _samples(shard))
    for key, parts in islice(samples, limit):
        yield make_item(source, f"{source}/{key}", parts, encoder)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and members of a shard's samples."""
    try:
        for parts in read_samples(str(shard)):
            key = parts.pop("__key__")
            if "__error__" in parts:
                error = parts["__error__"]
                raise SampleError(error.reason, error.detail, key)
            yield key, parts
    except DAMAGE as error:
        raise EvaluationError(f"{shard}: is damaged: {one_line(error)}") from None


def suite_samples(
    path: Path, source: str, encoder: SampleEncoder, limit: int | None = None
) -> Iterator[Item]:
    """The first `limit` samples of a folder of shards, or of a file of lines."""
    if path.is_dir():
        return read_shards(path, source, encoder, limit)
    return islice(read_lines(path, source, encoder), limit)


def read_lines(path: Path, source: str, encoder: SampleEncoder) -> Iterator[Item]:
    """Samples of a JSONL file: the JSON of a shard's samples; `file` of a medium is its path,
    from the folder of the JSONL file. Where it is not there, the sample cannot be encoded.

    Raises EvaluationError that names the file, or the line, and SampleError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        names = [medium.file for medium in _with_answers(where, line).media]
        missing = [path.parent / name for name in names if not (path.parent / name).is_file()]
        try:
            parts = {} if missing else {name: (path.parent / name).read_bytes() for name in names}
            item = make_item(source, where, {"json": line.encode()} | parts, encoder)
        except (OSError, ValueError, TypeError) as error:
            raise EvaluationError(f"{where}: {error}") from None
        yield replace(item, encode=partial(_refuse, where, missing[0])) if missing else item


def _with_answers(where: str, line: str) -> Sample:
    """The sample of a line. Raises EvaluationError where its answer is empty, and SampleError."""
    try:
        return parse_sample(where, line)
    except SampleError as error:
        if error.reason != "missing_text":
            raise
        turn = error.detail.partition(":")[0]
        raise EvaluationError(
            f"{where}: {turn}: the answer is empty: give the one that is expected, or leave the "
            "line out"
        ) from None


def _refuse(key: str, missing: Path) -> EncodedSample:
    raise SampleError("missing_media", f"{missing} is not there", key)


def make_item(source: str, key: str, parts: dict[str, bytes], encoder: SampleEncoder) -> Item:
    """An item of the members of a sample. Raises SampleError where its JSON is wrong, or none."""
    described = described_by(key, parts)
    sample, data = parse_sample(key, described), json.loads(described)
    return Item(
        source=source,
        key=key,
        sample=sample,
        encode=partial(encoder.encode, key, parts),
        task=data.get("task", sample.kind),
        options=tuple(data.get("options", ())),
        speech=tuple((int(second), text) for second, text in data.get("speech", ())),
    )


def sources_of(items: list[Any]) -> list[str]:
    """Names of the items' sources in order of appearance."""
    return list(dict.fromkeys(item.source for item in items))
