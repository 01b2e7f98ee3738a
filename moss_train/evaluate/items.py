"""What is evaluated: samples with an answer, read from shards or from lines of JSON."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.batch import EncodedSample
from data_pipeline.encode import SampleEncoder
from data_pipeline.schema import Sample, parse_sample
from data_pipeline.shards import shard_files


class EvaluationError(ValueError):
    """Something that cannot be evaluated; the text names it and says what to do."""


@dataclass(frozen=True)
class Item:
    """A sample as tensors, and what is known about its answer.

    source: what its scores are grouped by, such as `sft/video`.
    task: `caption`, `narrate`, or the kind of question.
    options: all possible answers; empty: free text.
    speech: real-time samples: (second, sentence) of what is to be said unasked.
    """

    source: str
    sample: Sample
    encoded: EncodedSample
    task: str
    options: tuple[str, ...] = ()
    speech: tuple[tuple[int, str], ...] = ()

    @property
    def answer(self) -> str:
        """The text of the last turn."""
        return self.sample.messages[-1].content


def read_shards(
    folder: Path, source: str, encoder: SampleEncoder, limit: int | None = None
) -> Iterator[Item]:
    """The samples of a folder of shards in their order, the first `limit` of them."""
    count = 0
    for shard in shard_files(folder):
        for key, parts in _samples(shard):
            if limit is not None and count >= limit:
                return
            count += 1
            yield make_item(source, f"{source}/{key}", parts, encoder)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and members; those of a sample stand together in a shard."""
    key, parts = "", dict[str, bytes]()
    with tarfile.open(shard) as tar:
        for member in tar:
            name, _, suffix = member.name.partition(".")
            if parts and name != key:
                yield key, parts
                parts = {}
            key, file = name, tar.extractfile(member)
            assert file is not None  # shards hold files only
            parts[suffix] = file.read()
    if parts:
        yield key, parts


def read_lines(path: Path, encoder: SampleEncoder) -> Iterator[Item]:
    """Samples of a JSONL file: the JSON of a shard's samples; `file` of a medium is its path,
    from the folder of the JSONL file.

    Raises EvaluationError that names the file, or the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            data = json.loads(line)
            names = [medium["file"] for medium in data.get("media", [])]
            parts = {name: (path.parent / name).read_bytes() for name in names}
            yield make_item(path.stem, where, {"json": line.encode()} | parts, encoder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(f"{where}: {error}") from None


def make_item(source: str, key: str, parts: dict[str, bytes], encoder: SampleEncoder) -> Item:
    """An item of the members of a sample. Raises SampleError for anything wrong with it."""
    sample, data = parse_sample(key, parts["json"]), json.loads(parts["json"])
    return Item(
        source=source,
        sample=sample,
        encoded=encoder.encode(key, parts),
        task=data.get("task", sample.kind),
        options=tuple(data.get("options", ())),
        speech=tuple((int(second), said) for second, said in data.get("speech", ())),
    )


def sources_of(items: list[Any]) -> list[str]:
    """Names of the items' sources in order of appearance."""
    return list(dict.fromkeys(item.source for item in items))
