"""What a log line shows, and which ranks write one."""

from __future__ import annotations

import re
import socket

import pytest

from moss_train.log import configure, log


@pytest.mark.parametrize(("rank", "levels"), [("0", ["INFO", "ERROR"]), ("3", ["ERROR"])])
def test_a_line_has_date_host_rank_and_level(monkeypatch, capsys, rank, levels):
    monkeypatch.setenv("RANK", rank)
    configure()
    log.info("begun")
    log.error("gone")
    lines = capsys.readouterr().err.splitlines()
    host = re.escape(socket.gethostname().split(".")[0])
    date = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    for line, level in zip(lines, levels, strict=True):
        message = {"INFO": "begun", "ERROR": "gone"}[level]
        assert re.fullmatch(f"{date} {host} rank {rank} {level} {message}", line)
