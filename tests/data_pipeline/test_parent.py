"""Workers of a killed process are gone, whatever they wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.moss_train.train.runs import is_running
from tests.torchrun import REPO
from tests.waiting import running, until

# The worker waits for a lock that nobody gives back.
PARENT = """
import multiprocessing, os, sys, time
from data_pipeline.parent import end_with_parent

def work(lock, parent, late):
    time.sleep(late)
    end_with_parent(parent)
    lock.acquire()

context = multiprocessing.get_context("fork")
lock = context.Lock()
lock.acquire()
worker = context.Process(target=work, args=(lock, os.getpid(), float(sys.argv[1])))
worker.start()
print(worker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("late", [0, 1], ids=["at work", "not begun"])
def test_a_worker_ends_with_a_parent_that_is_killed(late: float) -> None:
    command = [sys.executable, "-c", PARENT, str(late)]
    with running(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
    until(lambda: not is_running(worker))
