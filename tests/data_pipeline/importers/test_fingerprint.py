"""Whether an import notices that its source was edited."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.build import build_shards
from data_pipeline.importers import fingerprint as fingerprints
from data_pipeline.importers.fingerprint import fingerprint
from data_pipeline.shards import ShardError


def mark(*paths: Path) -> str:
    names = [str(path) for path in paths]
    return fingerprint(names, names)


def test_an_edit_of_the_same_length_is_another_source(tmp_path: Path) -> None:
    records, captions = tmp_path / "r.jsonl", tmp_path / "caps"
    records.write_text('{"text": "A cat."}\n')
    captions.mkdir()
    Image.new("RGB", (8, 8)).save(captions / "a.png")
    (captions / "a.txt").write_text("A cat.")
    for source, edited in ((records, records), (captions, captions / "a.txt")):
        out = tmp_path / f"out-{source.name}"
        build_shards(source, out)
        before = edited.stat()
        edited.write_text(edited.read_text().replace("cat", "dog"))
        os.utime(edited, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ShardError, match="holds an import with other arguments: source_files"):
            build_shards(source, out)


def test_a_copy_is_the_same_source(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"text": "A cat."}\n')
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "r.jsonl", tmp_path / "there/r.jsonl")
    os.utime(tmp_path / "there/r.jsonl", (1, 1))
    assert mark(tmp_path / "r.jsonl") == mark(tmp_path / "there/r.jsonl")


def test_of_large_and_many_files_a_part_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"s" * 100)
    large.write_bytes(b"l" * 50_000)
    monkeypatch.setattr(fingerprints, "_WHOLE", 200)
    monkeypatch.setattr(fingerprints, "_PIECE", 100)
    before = mark(small, large)

    def edited(path: Path, place: int) -> str:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        found = mark(small, large)
        data[place] ^= 1
        path.write_bytes(data)
        return found

    for path, place in ((small, 57), (large, 0), (large, 49_999)):
        assert edited(path, place) != before
    assert edited(large, 150) == before  # between two pieces
    assert mark(small, large) == before
    monkeypatch.setattr(fingerprints, "_FILES", 1)
    before = mark(small, large)
    assert edited(large, 0) == before
    assert edited(small, 0) != before


def test_a_link_to_nothing_counts_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    before = mark(tmp_path / "gone")
    (tmp_path / "gone").rename(tmp_path / "away")
    assert mark(tmp_path / "away") != before


def test_small_files_behind_a_large_one_count_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE", 1000)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"f" * 1000)
    second.write_bytes(b"s" * 10)
    before = mark(first, second)
    second.write_bytes(b"sssssSssss")
    assert mark(first, second) != before


def test_of_many_large_files_few_pieces_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Folders of thousands of tars lie on network disks, and each part of an import asks."""
    for name, value in (("_WHOLE", 0), ("_PIECE", 10), ("_ALL_PIECES", 30)):
        monkeypatch.setattr(fingerprints, name, value)
    paths = [tmp_path / str(number) for number in range(10)]
    for path in paths:
        path.write_bytes(b"l" * 1000)
    before = mark(*paths)
    paths[3].write_bytes(b"l" * 495 + b"x" * 10 + b"l" * 495)
    assert mark(*paths) != before  # three pieces: the second is the middle
    paths[3].write_bytes(b"l" * 300 + b"x" * 100 + b"l" * 600)
    assert mark(*paths) == before
