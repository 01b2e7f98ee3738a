"""What is not to be learned is refused: answers that say so, records without their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build import build_shards
from tests.data_pipeline.importers.realtime import run, said, write


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


def turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("question", "fields", "named"),
    [
        ("<image>q", {"img": "1.jpg"}, "img"),
        ("<image>q", {"where": ["x/1.jpg"]}, "where"),
        ("q", {"image_file": "1.jpg"}, "image_file"),
        ("q", {"media": [{"path": "1.mp4"}]}, "media"),
        ("<video>q", {"media": "1.ts"}, "media"),
        ("What is <video>?", {"path": "src/App.ts", "file": "b.ts"}, None),  # TypeScript
        ("<image>q", {"where": "page 1", "avatar": None}, None),
        ("q", {"where": "1.jpg", "avatar_image": "2.png", "image_caption": "a.b"}, None),
    ],
)
def test_a_record_whose_picture_is_under_another_name_is_no_text(
    question: str, fields: dict[str, Any], named: str | None, tmp_path: Path
) -> None:
    """The answer was learned without the picture, its mark as letters."""
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in/r.jsonl", {"conversations": turns(question), **fields})
    samples, summary = run(source)
    if named is None:
        assert [said(sample) for sample in samples] == [[question, "a"]]
        return
    assert summary.rejected == {"missing_file": 1}
    (line,) = (tmp_path / "out-0/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["detail"].startswith(f"{named}: ")
    assert json.loads(line)["detail"].endswith(
        "not read: call it images or videos, or give --media-column"
    )


def test_the_field_of_the_media_may_be_named(folder: Path) -> None:
    """`--media-column`, which was of tables alone: with `--form` it was ignored."""
    conversation = {"conversations": turns("<video>q"), "vid": "a.mp4"}
    asked = {"question": "q", "answer": "a", "vid": "a.mp4"}
    twice = conversation | {"video": "a.mp4"}
    source = write(folder / "r.jsonl", conversation, asked, {"text": "plain"}, twice)
    for form in (None, "sharegpt"):
        samples, summary = run(source, media_column="vid", form=form)
        wanted = [["<|video|>q", "a"]] * (1 if form else 2)
        assert [said(sample) for sample in samples if sample["media"]] == wanted
        assert summary.rejected["ambiguous_media"] == 1
    table = write(folder / "t.jsonl", {"vid": "a.mp4", "caption": "x"}, {"vid": "", "caption": "y"})
    (sample,), summary = run(table, media_column="vid")
    assert said(sample) == ["<|video|>", "x"]
    assert summary.rejected == {"missing_file": 1}


@pytest.mark.parametrize("columns", [{}, {"images": "pictures"}])
def test_a_picture_without_a_column_in_dataset_info_is_told(
    columns: dict[str, str], tmp_path: Path
) -> None:
    info = {"s": {"file_name": "r.jsonl", "formatting": "sharegpt", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    write(tmp_path / "r.jsonl", {"conversations": turns("<image>q"), "image": "1.jpg"})
    summary = build_shards(tmp_path, tmp_path / "out")
    assert summary.rejected == {"missing_file": 1}
    line = json.loads((tmp_path / "out/rejected.jsonl").read_text())
    assert line["detail"].endswith("name it in `columns` of dataset_info.json")
