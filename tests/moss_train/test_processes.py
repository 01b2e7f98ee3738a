"""A rank ends with its launcher, also where that is killed before the rank has begun to work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.commands import STOPPED
from moss_train.node_folders import claimed, remove_unclaimed
from moss_train.processes import STOPPED_NOTE
from tests.moss_train.train.runs import ENTRY, is_running
from tests.torchrun import REPO
from tests.waiting import running, until

RANK = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "one",
}  # fmt: skip


@pytest.mark.parametrize("ours", [False, True], ids=["torchrun", "launch/torchrun.py"])
def test_a_rank_that_still_imports_ends_with_its_launcher(ours, tmp_path):
    note = f"export {STOPPED_NOTE}=/proc/$$/fd/1; " if ours else ""
    script = (
        f'{note}"{sys.executable}" "{ENTRY}" model=tiny run.dir="{tmp_path}/run" & echo $!; wait'
    )
    environment = {**os.environ, **RANK}
    command = ["bash", "-c", script]
    with running(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        if not ours:  # before that nothing tells the rank whose child it was
            until(lambda: "libtorch" in Path(f"/proc/{rank}/maps").read_text())
        launcher.kill()
        until(lambda: not is_running(rank))


STOPPED_RANK = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("works", flush=True)
time.sleep(600)
"""


def test_a_job_that_is_asked_to_stop_twice_is_stopped_not_failed(tmp_path):
    """It is asked again and again: while it removes its files, waits for other machines, ends."""
    rank = tmp_path / "rank.py"
    rank.write_text(STOPPED_RANK)
    command = [sys.executable, "launch/torchrun.py", "--standalone", str(rank)]
    slurm = {**os.environ, "SLURM_NNODES": "2"}
    with running(command, cwd=REPO, env=slurm, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "works\n"
        launcher.send_signal(signal.SIGTERM)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        until(lambda: not children.read_text())

        def ended() -> bool:
            launcher.send_signal(signal.SIGTERM)
            return launcher.poll() is not None

        until(ended)
        assert launcher.returncode == STOPPED


def test_folders_of_processes_that_were_killed_are_removed(tmp_path):
    for name in ("own-1", "own-2", "own-3", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "own-3" / "stderr.log").touch()
    with claimed(tmp_path / "own-1"), claimed(tmp_path / "own-1"):
        remove_unclaimed(tmp_path, "own-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "own-1", "own-3"]
    remove_unclaimed(tmp_path, "own-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "own-3"]


@pytest.mark.parametrize("by_forks", [False, True])
def test_a_folder_is_held_by_forks_where_they_use_it(by_forks, tmp_path):
    """Torchrun's is its own: what a killed one leaves its next start removes, while ranks that are
    its forks still live."""
    (tmp_path / "own-1").mkdir()
    (ends, goes_on), (forked, begins) = os.pipe(), os.pipe()
    with claimed(tmp_path / "own-1", by_forks=by_forks):
        fork = os.fork()
        if fork == 0:
            os.close(goes_on)
            os.write(begins, b".")
            os.read(ends, 1)
            os._exit(0)
        remove_unclaimed(tmp_path, "own-")
        assert (tmp_path / "own-1").exists(), "by_forks or not, this process holds it"
    assert os.read(forked, 1) == b"."  # it has let go, if it does
    remove_unclaimed(tmp_path, "own-")
    assert (tmp_path / "own-1").exists() is by_forks
    os.close(goes_on)
    assert os.waitpid(fork, 0)[1] == 0
    remove_unclaimed(tmp_path, "own-")
    assert not any(tmp_path.iterdir())
