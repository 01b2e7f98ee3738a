"""The index of a folder of shards: it has all of them, or there is an error; never a wait for ever.

A pipe with a shard's name holds the process that reads it where it is, for as long as a test needs.
"""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_pipeline.index import prepare_index
from data_pipeline.shards import ShardError, ShardWriter
from data_pipeline.signal_handlers import handling
from tests.moss_train.train.runs import is_running
from tests.torchrun import REPO
from tests.waiting import until


def _shard(folder: Path, number: int, keys: str = "abcdef") -> Path:
    writer = ShardWriter(folder, first=number)
    for key in keys:
        writer.write({"__key__": key, "json": {"text": key}, "0.jpg": key.encode() * 700})
    shard = writer.finish()
    assert shard is not None
    return shard


def _readers(process: psutil.Process) -> list[psutil.Process]:
    """The processes two below this one: those with which energon reads."""
    return [inner for child in process.children() for inner in child.children()]


def _torn_header(data: bytes, at: int) -> bytes:
    return data[: at + 5] + b"\xff\xff" + data[at + 7 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_torn_header, r"byte 7680 is not the header"),
        (lambda data, at: data[:at] + bytes(1024) + data[at + 1024 :], r"byte 7680 is not"),
        (lambda data, at: data[:at], "the end of the archive is missing"),
        (lambda data, at: data[: at + 100], r"byte 7680 is not"),
        (lambda data, _: data + data, r"byte \d+ is not the header"),
        (lambda data, _: gzip.compress(data), "compressed"),
    ],
    ids=["torn header", "hole", "cut between members", "cut in a header", "joined", "compressed"],
)
def test_samples_that_no_index_would_have_are_an_error(
    tmp_path: Path, damage: Callable[[bytes, int], bytes], message: str
) -> None:
    shard = _shard(tmp_path, 0)
    with tarfile.open(shard) as tar:
        at = tar.getmembers()[6].offset
    assert at == 7680
    shard.write_bytes(damage(shard.read_bytes(), at))
    with pytest.raises(ShardError, match=f"shard-000000.tar: .*{message}"):
        prepare_index(tmp_path)
    assert not (tmp_path / ".nv-meta" / "dataset.yaml").exists()


def test_a_reader_that_is_killed_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "shard-000000.tar")
    errors: list[str] = []

    def index() -> None:
        with pytest.raises(ShardError) as error:
            prepare_index(tmp_path)
        errors.append(str(error.value))

    thread = threading.Thread(target=index, daemon=True)
    thread.start()
    until(lambda: _readers(psutil.Process()))
    _readers(psutil.Process())[0].kill()
    until(lambda: errors)
    assert len(errors) == 1
    assert "a process was killed (exit code -9" in errors[0]
    assert "fewer workers" in errors[0]


def test_a_killed_index_leaves_no_process(tmp_path: Path) -> None:
    """They would hold the lock of the import that they belong to."""
    os.mkfifo(tmp_path / "shard-000000.tar")
    command = [sys.executable, "-m", "data_pipeline.index", str(tmp_path)]
    running = subprocess.Popen(command, cwd=REPO)
    process = psutil.Process(running.pid)
    until(lambda: _readers(process))
    below = [child.pid for child in process.children(recursive=True)]
    running.kill()
    running.wait()
    assert len(below) == 2
    until(lambda: not any(map(is_running, below)))


def test_a_key_that_is_there_twice_is_told_in_a_program_with_a_handler_of_sigterm(
    tmp_path: Path,
) -> None:
    _shard(tmp_path, 0, "ab")
    _shard(tmp_path, 1, "bc")
    os.mkfifo(tmp_path / "shard-000002.tar")  # one that reads on when the key is found
    twice = pytest.raises(ShardError, match="duplicate keys")
    with handling([signal.SIGTERM], lambda *_: None), twice:
        prepare_index(tmp_path)
