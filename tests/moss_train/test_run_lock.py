"""One job at a time in a run folder."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moss_train import run_lock
from moss_train.config import ConfigError
from moss_train.run_lock import LOCK_FILE, check_free, running_in
from tests.waiting import running, until

# Another process that trains there, until it is killed.
OTHER = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("node7, process 12\\n")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""
LONG = 200.0  # seconds
LOCK = """
import fcntl, sys
fcntl.lockf(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "EVERY", 0.1)
    monkeypatch.setattr(run_lock, "STALE", 1.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A holder may be silent for minutes, as on a machine that has much else to do."""
    monkeypatch.setattr(run_lock, "STALE", LONG)
    return monkeypatch


def test_a_second_job_is_refused_while_the_first_one_lives(tmp_path: Path):
    path = tmp_path / LOCK_FILE
    check_free(tmp_path / "new")
    check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-c", OTHER, str(path)]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        said = rf"^run.dir={tmp_path}: another job trains there \(node7, process 12\): choose"
        with pytest.raises(ConfigError, match=said):
            check_free(tmp_path)
        with pytest.raises(ConfigError, match=said), running_in(tmp_path):
            pass
    assert path.read_text() == "node7, process 12\n"  # a killed job leaves it, free
    check_free(tmp_path)
    with running_in(tmp_path):
        assert ", process " in path.read_text()
    assert not path.exists()
    with pytest.raises(RuntimeError, match="it failed"), running_in(tmp_path):
        raise RuntimeError("it failed")
    assert not path.exists()


def test_where_a_lock_says_nothing_signs_of_life_do(tmp_path: Path, patient: pytest.MonkeyPatch):
    path = tmp_path / LOCK_FILE
    # The holder's process on another machine, whose locks do not reach this one: it gives signs of
    # life, then it is killed.
    touching = "import os, sys, time\nwhile True:\n os.utime(sys.argv[1])\n time.sleep(0.1)"
    path.write_text("node7, process 12\n")
    with (
        running([sys.executable, "-c", touching, str(path)]),
        pytest.raises(ConfigError, match=r"another job trains there \(node7, process 12\)"),
    ):
        check_free(tmp_path)
    patient.setattr(run_lock, "STALE", 1.0)
    check_free(tmp_path)
    patient.setattr(run_lock, "STALE", LONG)
    began = time.monotonic()
    with running_in(tmp_path):
        assert time.monotonic() - began < LONG  # it is not watched a second time
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", LOCK, str(path)], check=True, stderr=-3)
        before = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > before)
    assert not path.exists()


@pytest.mark.parametrize("copied", [False, True])
def test_a_lease_that_is_given_back_while_it_is_watched_is_taken(
    tmp_path: Path, patient: pytest.MonkeyPatch, copied: bool
):
    """Its file is gone then: one of the same name has to be made, which others see; also where a
    copy of the folder by links keeps the old one."""
    path = tmp_path / LOCK_FILE
    path.write_text("node7, process 12\n")
    if copied:
        (tmp_path / "copy").hardlink_to(path)
    ending = threading.Timer(1.0, path.unlink)
    ending.start()
    with running_in(tmp_path):
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", LOCK, str(path)], check=True, stderr=-3)
        assert "node7" not in path.read_text()
    ending.join()
    assert not path.exists()
