"""Workers that look into shards: they end with their command, and one that is killed is told of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shards import ShardError
from tests.moss_train.train.runs import is_running
from tests.torchrun import REPO
from tests.waiting import running, until
from tools.shards.workers import each_shard

COMMAND = """
import os, sys, time
from pathlib import Path
from tools.shards.workers import each_shard

def work(folder):
    Path(folder, f"{os.getpid()}").touch()
    time.sleep(600)

list(each_shard(work, [Path(sys.argv[1])] * 2, 2))
"""


def test_workers_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    with running([sys.executable, "-c", COMMAND, str(tmp_path)], cwd=REPO, stderr=subprocess.PIPE):
        until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    until(lambda: not any(map(is_running, workers)))


def test_a_worker_that_is_killed_is_one_clear_error() -> None:
    with pytest.raises(ShardError, match=r"a worker process was killed.*fewer --workers"):
        list(each_shard(_end, [Path("a"), Path("b")], 1))


def _end(_shard: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
