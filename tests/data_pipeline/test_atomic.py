"""Files and folders that have their name only when they are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.atomic import FolderInUse, new_folder, partial_path, publish, write_atomically


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old\n")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new\n")
    assert path.read_text() == "old\n"
    monkeypatch.undo()
    write_atomically(path, "new\n")
    assert path.read_text() == "new\n"
    assert os.listdir(tmp_path) == ["state.json"]


def test_half_a_character_is_escaped_and_bytes_stay_as_they_are(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "a\udc80ä")
    assert (tmp_path / "text").read_bytes() == b"a\\udc80\xc3\xa4"
    write_atomically(tmp_path / "bytes", b"\xff\x00")
    assert (tmp_path / "bytes").read_bytes() == b"\xff\x00"


def test_a_partial_file_gets_its_name(tmp_path: Path) -> None:
    partial = partial_path(tmp_path / "0.tar")
    assert partial.name == "0.tar.partial"
    partial.write_text("whole")
    assert publish(partial) == tmp_path / "0.tar"
    assert (tmp_path / "0.tar").read_text() == "whole"


def test_a_folder_appears_when_all_went_well(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    left = tmp_path / ".out.partial" / "old"
    left.mkdir(parents=True)
    with new_folder(out) as partial:
        assert f"removing {partial}, left by a process that was killed" in capsys.readouterr().err
        assert not left.exists()
        with (
            pytest.raises(FolderInUse, match="out: another process is writing it"),
            new_folder(out),
        ):
            pass
        (partial / "file").write_text("content")
        assert not out.exists()
    assert os.listdir(out) == ["file"]
    with pytest.raises(FolderInUse, match="out: exists: choose another"), new_folder(out):
        pass


def test_a_folder_is_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []
