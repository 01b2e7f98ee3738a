"""Starts and ends of jobs stay in a run's folder, whatever became of them."""

from __future__ import annotations

import os

import pytest

from moss_train.processes import age_s
from moss_train.train.history import HISTORY_FILE, note, noting_errors, read_history


def test_entries_are_kept_and_a_line_that_was_cut_off_is_left_out(tmp_path):
    note(tmp_path, "start", step=0, hosts={"node1": 8})
    with (tmp_path / HISTORY_FILE).open("a") as out:
        out.write('{"event": "st\n')
    with pytest.raises(ValueError, match="no"), noting_errors(tmp_path):
        raise ValueError("no")
    first, second = read_history(tmp_path)
    assert (first["event"], first["hosts"]) == ("start", {"node1": 8})
    assert (second["event"], second["error"]) == ("error", "ValueError: no")
    assert first["time"] <= second["time"]


def test_what_cannot_be_written_is_a_warning_and_waits(tmp_path, caplog):
    folder = tmp_path / "none"
    for event in ("start", "stopped"):
        note(folder, event)
    (said,) = caplog.messages
    assert said.startswith(f"{folder}/{HISTORY_FILE} cannot be written ")
    folder.mkdir()
    note(folder, "start")
    assert [entry["event"] for entry in read_history(folder)] == ["start", "stopped", "start"]


def test_the_age_of_this_process_grows():
    assert 0 < age_s(os.getpid()) <= age_s(os.getpid())
