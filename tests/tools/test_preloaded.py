"""Commands that are forks of a process with torch and megatron in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.moss_train.train.runs import is_running
from tests.torchrun import start_ranks
from tests.waiting import PATIENCE, until
from tools import preloaded

MODULE = "tests.workers.command"


def command(tmp_path: Path, *arguments: str) -> preloaded.Command:
    environment = {"PATH": os.environ["PATH"], "MARK": "given"}
    return preloaded.Command(MODULE, [*arguments], environment, tmp_path / "log")


def test_a_command_gets_its_arguments_and_environment(tmp_path: Path) -> None:
    started = command(tmp_path, "3", "two words")
    assert started.wait(240) == 3
    assert started.poll() == 3
    mark, said, _ = (tmp_path / "log").read_text().splitlines()
    assert (mark, said) == ("given", "3 | two words")


@pytest.mark.parametrize("before", ["", "forkserver.ensure_running(); "])
def test_a_command_has_the_modules_as_a_job_has_them(before: str) -> None:
    """Without wandb, which makes folders that a killed process leaves. Of a process of its own: one
    has one fork server, and a server's decoders may have asked first, for other modules."""
    code = f"from multiprocessing import forkserver; {before}"
    code += f"from tools import preloaded; preloaded.run({MODULE!r}, '0')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "megatron.core True wandb False"


def test_a_command_that_fails_is_named() -> None:
    with pytest.raises(subprocess.CalledProcessError, match=f"'{MODULE}', '4'.*exit status 4"):
        preloaded.run(MODULE, "4")
    preloaded.run(MODULE, "0")


def test_waiting_has_an_end(tmp_path: Path) -> None:
    started = command(tmp_path, "sleep")
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(0.5)
    assert started.poll() is None
    os.kill(started.pid, 9)
    assert started.wait(PATIENCE) == -9


def test_helpers_of_ranks_end_with_them(tmp_path: Path) -> None:
    run = start_ranks("tests/workers/misbehave.py", 2, "hang", out=tmp_path)
    until(lambda: len(list(tmp_path.glob("tensor.rank*"))) == 2)
    helpers = [child for rank in run.rank_pids() for child in children(rank)]
    assert len(helpers) == 2 * (sys.platform == "linux")
    run.kill()
    until(lambda: not any(is_running(pid) for pid in helpers))


def test_an_interrupt_is_an_exception_in_a_rank_as_in_an_interpreter_of_its_own(
    tmp_path: Path,
) -> None:
    run = start_ranks("tests/workers/misbehave.py", 2, "interrupt", out=tmp_path)
    assert run.wait(PATIENCE).load_all("interrupted") == [True, True]


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
