"""Streams whose records say that they, or an answer of theirs, are not to be learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.build import build_shards
from tests.data_pipeline.importers.realtime import write


def streamo(**fields: Any) -> dict[str, Any]:
    asked = {"content": "?", "time": 1}
    answer = {"content": "x", "st_time": 2, "end_time": 3}
    return {"video_path": "a.mp4", "question": [asked], "response": [answer]} | fields


UNWANTED = [
    streamo(response=[{"content": "x", "st_time": 2, "end_time": 3, "loss": False}]),
    streamo(label=False),
    {"video_uid": "a", "conversation": [
        {"role": "user", "content": "?", "time": 1, "loss": False},
        {"role": "assistant", "content": "x", "time": 2, "weight": 0}]},
    {"video": "a.mp4", "loss": False, "words": [[1, 2, "hi"]]},
    {"video": {"path": "a.mp4", "frame_timestamps": [0]}, "train": False, "messages": [
        {"role": "user", "content": "<|video|>"}, {"role": "assistant", "content": "x"}]},
]  # fmt: skip


def test_streams_that_are_not_to_be_learned_are_refused(folder: Path) -> None:
    out = folder.parent / "out"
    summary = build_shards(write(folder / "raw.jsonl", *UNWANTED), out)
    assert summary.rejected == {"no_labels": 4, "preference_data": 1}
    details = [json.loads(line)["detail"] for line in (out / "rejected.jsonl").open()]
    assert [detail.split(" is")[0] for detail in details] == [
        "response[0].loss", "label", "conversation[1].weight", "loss", "train",
    ]  # fmt: skip


def test_classes_metrics_and_splits_of_plain_rows_refuse_nothing(tmp_path: Path) -> None:
    """A text or a caption has no answer that such a field could speak of."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.csv").write_text("text,weight,label\none,1,True\ntwo,0,False\n")
    rows = [{"text": "a", "loss": 0.0}, {"text": "b", "train": False}, {"text": "c", "chosen": "d"},
            {"text": "e", "learn": False}]  # fmt: skip
    write(source / "b.jsonl", *rows)
    summary = build_shards(source, tmp_path / "out")
    assert summary.imported == {"text": 4}
    assert summary.rejected == {"preference_data": 1, "no_labels": 1}
    assert summary.notes == {
        "unused field weight": 2, "unused field label": 2, "unused field loss": 1,
        "unused field train": 1,
    }  # fmt: skip
