"""Signals, kills, damaged checkpoints, errors of one rank: what a job loses, and what it says."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moss_train.checkpoint_dir import write_complete
from moss_train.processes import STOPPED_NOTE
from tests.moss_train.train.runs import (
    ENDLESS,
    ENTRY,
    Process,
    audit,
    end_orphans,
    flip_a_bit,
    is_running,
    losses,
    saved_steps,
    steps,
)
from tests.pages import open_page
from tests.torchrun import UNKILLED, Run, run_ranks, start_ranks
from tests.waiting import until

EVERY, STEPS = 2, 14
HELD = "tests/workers/held.py"
Overrides = list[str]


@pytest.fixture(scope="module")
def job(small) -> Overrides:
    """Two tensor-parallel ranks that save every other step."""
    return [*small, "parallel=tp2", f"trainer.steps={STEPS}", f"trainer.checkpoint_every={EVERY}"]


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory) -> Path:
    """The run folder of a job that nothing happened to."""
    out = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(ENTRY, 2, *job, f"run.dir={out}/run", out=out, timeout=300)
    return out / "run"


@pytest.fixture
def start(job, tmp_path) -> Iterator[Callable[..., Run]]:
    """Starts the job, again and again, in one run folder; `preloaded=False`: as a user does;
    `hold`: after this step it waits for what the test does to it."""
    number, note = iter(range(100)), tmp_path / "note"
    note.touch()

    def again(*more: str, hold: int = STEPS, preloaded: bool = True) -> Run:
        out, options = tmp_path / f"start{next(number)}", [*more, f"run.dir={tmp_path}/run"]
        return start_ranks(
            HELD, 2, str(hold), *job, *options, out=out, preloaded=preloaded,
            env={**UNKILLED, STOPPED_NOTE: str(note)},
        )  # fmt: skip

    yield again
    end_orphans(tmp_path)


def wait_for_step(run: Path, step: int) -> None:
    until(lambda: max(steps(run, whole=False), default=0) >= step)


def test_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(
    start, uninterrupted, tmp_path
):
    folder, chance, resumed = tmp_path / "run", random.Random(5), 0
    for preloaded in (False, True):
        running = start(hold=resumed + 2 * EVERY + 1, preloaded=preloaded)
        wait_for_step(folder, resumed + chance.randint(EVERY + 1, 2 * EVERY))
        time.sleep(chance.uniform(0, 0.6))
        ranks = running.rank_pids()
        os.kill(chance.choice(ranks), signal.SIGKILL)
        assert running.wait(check=False).returncode == 1
        assert not any(is_running(pid) for pid in ranks)
        lost = steps(folder, whole=False)[-1] - saved_steps(folder)[-1]
        assert 0 <= lost <= EVERY
        assert saved_steps(folder)[-1] > resumed
        resumed = saved_steps(folder)[-1]

    # A save that goes on beside the steps gets its name with a later step.
    saving = resumed + 2 * EVERY
    running = start("trainer.async_save=true", hold=saving)
    until(lambda: (folder / "checkpoints" / f".writing_step_{saving:08d}").exists())
    running.kill()
    assert (folder / "checkpoints" / f".writing_step_{saving:08d}").exists()
    lost = steps(folder, whole=False)[-1] - saved_steps(folder)[-1]
    assert 0 < lost <= 2 * EVERY

    last = folder / "checkpoints" / f"step_{saved_steps(folder)[-1]:08d}"
    before = folder / "checkpoints" / f"step_{saved_steps(folder)[-2]:08d}"
    weights = weights_file(last)
    os.truncate(weights, weights.stat().st_size // 2)
    (folder / "checkpoints" / "latest").unlink()
    # Of a start before, which torchrun had stopped: another machine has come.
    (tmp_path / "note").write_text("stopped")
    said = start().wait(timeout=300).stderr()
    assert (tmp_path / "note").read_text() == ""  # launch/torchrun.py would end with 130
    assert f"WARNING checkpoint {last} is damaged: {weights.name} has " in said
    assert f"WARNING {last} is damaged: it is .damaged_{last.name} now" in said
    assert re.search(r"WARNING removing .*/\.writing_step_\d+: a save .* was cut off", said)
    assert f"resumed {before} after step {before.name[-2:].lstrip('0')}" in said
    assert steps(folder) == list(range(1, STEPS + 1))
    assert losses(folder) == losses(uninterrupted)
    assert audit(folder) == audit(uninterrupted)
    assert saved_steps(folder) == [STEPS - EVERY, STEPS]
    assert (folder / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}\n"
    assert [path.name for path in folder.glob("checkpoints/.*")] == [f".damaged_{last.name}"]


def test_sigterm_saves_and_the_next_start_goes_on(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    running = start("trainer.checkpoint_every=1000", hold=4)
    wait_for_step(folder, 1)
    for pid in running.rank_pids():
        os.kill(pid, signal.SIGTERM)
    result = running.wait()
    assert result.returncode == 0
    assert (tmp_path / "note").read_text() == "stopped"
    first = steps(folder)[-1]
    assert first < STEPS
    assert saved_steps(folder) == [first]
    assert f"stopped by a signal after step {first}: start again to go on" in result.stderr()
    page = open_page(folder / "report.html")
    assert f"Stopped after step {first} of {STEPS}" in page.text

    # A batch system's signal reaches torchrun too, which passes it on: the ranks get it twice.
    running = start("trainer.checkpoint_every=1000", hold=first + 4, preloaded=False)
    wait_for_step(folder, first + 1)
    ranks = running.rank_pids()
    running.signal(signal.SIGTERM)
    result = running.wait(check=False)
    assert result.returncode != 0  # torchrun's own word for a signal
    assert not any(is_running(pid) for pid in ranks)
    second = steps(folder)[-1]
    assert first < second < STEPS
    assert saved_steps(folder) == [first, second]
    assert losses(folder) == losses(uninterrupted)[:second]


@pytest.mark.parametrize(
    ("number", "preloaded"),
    [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGUSR1, True)],
)
def test_a_signal_to_all_processes_stops_a_single_one_cleanly(small, tmp_path, number, preloaded):
    """As Ctrl-C in a terminal does: the data workers get it too."""
    folder = tmp_path / "run"
    options = [*small, f"trainer.steps={ENDLESS}", f"run.dir={folder}"]
    running = Process(options, tmp_path, preloaded)
    try:
        wait_for_step(folder, 2)
    finally:  # by itself it does not end
        os.killpg(running.process.pid, number)
    assert running.wait() == 130, running.log.read_text()
    assert saved_steps(folder) == steps(folder)[-1:]
    assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize(
    ("how", "rank", "layout", "error"),
    [
        ("raise", 1, "tp2", "ValueError: rank 1 has a bad day"),
        ("tokens", 1, "dp2", "ValueError: step 3: token 70000"),
        ("tokens", 0, "pp2", "ValueError: step 3: token 70000"),
        ("loader", 0, "tp2", "OSError: the storage has a bad day"),
    ],
)
def test_an_error_on_one_rank_ends_the_job(small, tmp_path, how, rank, layout, error):
    options = [*small, f"parallel={layout}", f"run.dir={tmp_path}/run"]
    worker = "tests/workers/faulty.py"
    running = start_ranks(
        worker, 2, how, str(rank), *options, out=tmp_path, preloaded=how != "raise", env=UNKILLED
    )
    result = running.wait(check=False)
    assert result.returncode == 1
    assert error in result.stderr(rank)
    root = result.launcher().partition("Root Cause")[2]
    assert f"rank      : {rank} " in root or layout == "pp2"
    assert error in root
    assert steps(tmp_path / "run") == [1, 2]


@pytest.fixture
def checkpoints(uninterrupted, tmp_path) -> Path:
    """A copy of a run's last two checkpoints: its folder, to be damaged."""
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run" / "checkpoints"


def weights_file(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    os.truncate(weights_file(folder), 100)


def change_size(folder: Path) -> None:
    with (folder / ".metadata").open("a") as out:
        out.write("x")


def garble_run(folder: Path) -> None:
    path = folder / "run.json"
    path.write_bytes(b"\xff" * path.stat().st_size)


def empty_run(folder: Path) -> None:
    path = folder / "run.json"
    path.write_text("{}".ljust(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a truncated file": truncate,
    "a grown file": change_size,
    "a missing file": lambda folder: weights_file(folder).unlink(),
    "no complete.json": lambda folder: (folder / "complete.json").unlink(),
    "half a complete.json": lambda folder: os.truncate(folder / "complete.json", 40),
    "another complete.json": lambda folder: (folder / "complete.json").write_text("[1, 2]"),
    "a list in complete.json": lambda folder: (folder / "complete.json").write_text(
        '{"files": []}'
    ),
    "no run.json": lambda folder: (folder / "run.json").unlink(),
    "garbage in run.json": garble_run,
    "nothing in run.json": empty_run,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(checkpoints, caplog, damage):
    from moss_train.checkpoint_dir import find

    newest, before = checkpoints / f"step_{STEPS:08d}", checkpoints / f"step_{STEPS - EVERY:08d}"
    assert find(checkpoints.parent) == newest
    assert not caplog.messages
    DAMAGES[damage](newest)
    assert find(checkpoints.parent) == before
    (said,) = caplog.messages
    assert said.startswith(f"checkpoint {newest} is damaged: ")
    assert said.endswith(": trying the one before")
    assert find(newest) is None
    DAMAGES[damage](before)
    assert find(checkpoints.parent) is None


def test_a_folder_that_is_being_written_is_no_checkpoint(checkpoints):
    from moss_train.checkpoint_dir import find

    newest, before = checkpoints / f"step_{STEPS:08d}", checkpoints / f"step_{STEPS - EVERY:08d}"
    newest.rename(checkpoints / f".writing_{newest.name}")
    assert find(checkpoints.parent) == before


def test_a_bit_that_flipped_is_found_and_the_checkpoint_before_is_loaded(
    checkpoints, job, tmp_path
):
    newest, before = checkpoints / f"step_{STEPS:08d}", checkpoints / f"step_{STEPS - EVERY:08d}"
    weights = weights_file(newest)
    flip_a_bit(weights)
    folder = f"run.dir={tmp_path}/run"
    said = run_ranks(ENTRY, 2, *job, folder, out=tmp_path / "out").stderr()
    wrong = f"{weights.name}: not the bytes that were written"
    assert f"checkpoint {newest} is damaged: {wrong}: trying the one before" in said
    assert f"resumed {before} after step {STEPS - EVERY}" in said
    assert saved_steps(tmp_path / "run") == [STEPS - EVERY, STEPS]
    assert [path.name for path in checkpoints.glob(".*")] == [f".damaged_{newest.name}"]

    for path in (newest, before):
        flip_a_bit(weights_file(path))
    result = run_ranks(ENTRY, 2, *job, folder, out=tmp_path / "none", check=False)
    assert result.returncode == 1
    assert "none of its checkpoints can be loaded: bring one back, or begin at" in result.stderr()
    assert saved_steps(tmp_path / "run") == [STEPS - EVERY, STEPS]


def test_a_checkpoint_that_one_machine_does_not_see_ends_the_start_and_is_not_damaged(tmp_path):
    """The machine is named, on all ranks; nothing is renamed."""
    (tmp_path / "weights").write_text("1234")
    write_complete(tmp_path)
    worker = "tests/workers/agreement.py"
    result = run_ranks(worker, 2, "damage", str(tmp_path), out=tmp_path / "out")
    said = (
        f"StorageError: {tmp_path}/unmounted/complete.json is not there for rank 1, on "
        f"{socket.gethostname()}, but for rank 0: nothing was changed; start again when all "
        "machines see the same files"
    )
    assert result.load_all("found") == [said, said]
