"""--split: the records of the splits that are wanted, and a count of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.build import BuildOptions, build_shards
from data_pipeline.engines.collect import collect
from data_pipeline.engines.job import Job, make_part
from data_pipeline.importers.forms import SourceOptions
from data_pipeline.shards import ShardError
from tests.data_pipeline.importers.realtime import run, said, write
from tools.data.check import check_source

TRAIN = SourceOptions(splits=("train", "restval"))
RECORDS = [
    {"text": "a", "split": "train"},
    {"text": "b", "split": "test"},
    {"text": "c", "split": "restval"},
    {"text": "d", "split": "test"},
    {"text": "e"},
]
LEFT_OUT = {"record of the split test, left out": 2}


def texts(samples: list[dict[str, Any]]) -> list[str]:
    return [said(sample)[1] for sample in samples]


def test_records_of_other_splits_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in/r.jsonl", *RECORDS)
    samples, summary = run(source, splits=TRAIN.splits)
    assert texts(samples) == ["a", "c"]
    assert summary.rejected == {"bad_schema": 1}
    assert summary.notes == LEFT_OUT
    checked = check_source(str(source), BuildOptions(source=TRAIN), None, 1)
    assert (checked.usable, checked.noted) == ({"text": 2}, LEFT_OUT)
    samples, summary = run(source)
    assert texts(samples) == ["a", "b", "c", "d", "e"]
    assert summary.notes == {"unused field split": 4}


def test_parts_count_what_they_leave_out_together(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", *(RECORDS * 100))
    job = Job(str(source), str(tmp_path / "out"), BuildOptions(source=TRAIN), 3)
    job.begin(resume=False)
    for number in range(3):
        make_part(job, number)
    summary = collect(job, 1)
    assert summary.imported == {"text": 200}
    assert summary.notes == {"record of the split test, left out": 200}


def test_parts_of_a_folder_count_its_other_pictures_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    told = [("a", "train"), ("b", "test"), ("c", "test")]
    records = [{"file_name": f"{name}.png", "text": name, "split": split} for name, split in told]
    write(folder / "metadata.jsonl", *records)
    job = Job(str(folder), str(tmp_path / "out"), BuildOptions(source=TRAIN), 3)
    job.begin(resume=False)
    for number in range(3):
        make_part(job, number)
    summary = collect(job, 1)
    assert summary.imported == {"image": 1}
    assert summary.notes == {
        "record of the split test, left out": 2,
        "picture or video that no record of the splits names, left out": 3,
    }


def test_a_folder_without_other_pictures_has_no_note_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    write(folder / "metadata.jsonl", {"file_name": "a.png", "text": "A.", "split": "train"})
    _, summary = run(folder, splits=TRAIN.splits)
    assert (summary.imported, summary.notes) == ({"image": 1}, {})


@pytest.mark.parametrize("split", [True, None, " ", ["train"]])
def test_what_is_no_name_says_no_split(split: Any, tmp_path: Path) -> None:
    """An empty field of a table, a mark that says something else."""
    (tmp_path / "in").mkdir()
    record = {"text": "a", "split": split}
    samples, _ = run(write(tmp_path / "in/train.jsonl", record), splits=("train",))
    assert texts(samples) == ["a"]
    _, summary = run(write(tmp_path / "in/r.jsonl", record), splits=("train",))
    assert (summary.rejected, summary.notes) == ({"bad_schema": 1}, {})


def test_numbers_name_splits_where_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    records = [{"text": "a", "split": 0}, {"text": "b", "split": 1}]
    samples, summary = run(write(tmp_path / "in/r.jsonl", *records), splits=("0",))
    assert texts(samples) == ["a"]
    assert summary.notes == {"record of the split 1, left out": 1}
    samples, _ = run(write(tmp_path / "in/train.jsonl", *records), splits=("train",))
    assert texts(samples) == ["a", "b"]


def test_files_named_after_a_split_say_whose_their_records_are(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/train-00000-of-00001.jsonl", {"text": "a"})
    write(tmp_path / "in/test-00000-of-00001.jsonl", {"text": "b"})
    samples, summary = run(tmp_path / "in", splits=TRAIN.splits)
    assert texts(samples) == ["a"]
    assert summary.notes == {"record of the split test, left out": 1}


def test_folders_named_after_a_split_say_whose_their_pictures_are(tmp_path: Path) -> None:
    """As the image folders of Hugging Face's datasets are."""
    for split in ("train", "test"):
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True)
        for name in ("0.png", "1.png"):
            Image.new("RGB", (8, 8)).save(folder / name)
        write(folder / "metadata.jsonl", {"file_name": "0.png", "text": f"Of {split}."})
    samples, summary = run(tmp_path / "in", splits=TRAIN.splits)
    assert texts(samples) == ["Of train."]
    assert summary.notes == {
        "record of the split test, left out": 1,
        "picture or video that no record of the splits names, left out": 3,
    }
    assert not summary.rejected


def test_sources_without_records_have_no_splits(tmp_path: Path) -> None:
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nWords.\n")
    with pytest.raises(ShardError, match=r"--split: .*a\.srt is transcripts, without records"):
        build_shards(tmp_path / "a.srt", tmp_path / "out", BuildOptions(source=TRAIN))
    assert not (tmp_path / "out").exists()


def test_other_splits_are_another_import(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", *RECORDS)
    build_shards(source, tmp_path / "out", BuildOptions(source=TRAIN))
    known = json.loads((tmp_path / "out/build.json").read_text())
    assert known["result"]["notes"] == LEFT_OUT
    with pytest.raises(ShardError, match="holds an import with other arguments: splits"):
        build_shards(source, tmp_path / "out")
