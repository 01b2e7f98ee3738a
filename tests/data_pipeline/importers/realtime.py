"""Imports of small real-time records, and what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.build import BuildOptions, Summary, build_shards
from data_pipeline.importers.forms import SourceOptions
from tests.samples import imported

SILENCE, FRAME = "<|silence|>", "<|video|>"
WATCHED = SILENCE + FRAME  # a second in which nothing is said


def run(source: Path, **how: Any) -> tuple[list[dict[str, Any]], Summary]:
    """The samples of a source, in the order of their keys."""
    around = source.parent if source.is_dir() else source.parent.parent
    out = around / f"out-{len(list(around.glob('out-*')))}"
    summary = build_shards(source, out, BuildOptions(source=SourceOptions(**how)))
    return [sample for _, sample in sorted(imported(out).items())], summary


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(sample: dict[str, Any]) -> list[str]:
    return [message["content"] for message in sample["messages"]]
