"""lmms-eval from its package asks our server about local tasks, and scores as we do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import pytest

from data_pipeline.commands import DONE, FAILED
from inference.evaluate.harness.server import Server, Serving
from inference.evaluate.results import BenchmarkError, read_items, read_results
from tests.tools.evaluate.local_tasks import Local, write_tasks
from tests.torchrun import REPO
from tests.waiting import PATIENCE
from tools.demo.checkpoint import SHIPPED, unpack
from tools.evaluate.__main__ import main
from tools.evaluate.lmms_environment import DEFAULT, check_environment

ENVIRONMENT = Path(os.environ.get("MOSS_LMMS", DEFAULT))
COUNT = 6


def environment() -> str:
    """Why the environment cannot be used; "" where it can."""
    try:
        check_environment(ENVIRONMENT)
    except BenchmarkError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(environment()), reason=environment() or "it is there")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    return write_tasks(tmp_path_factory.mktemp("local"), COUNT)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that the demo starts from."""
    out = tmp_path_factory.mktemp("export") / "sft"
    unpack(SHIPPED, out)
    return out


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patched.setenv("HF_HUB_OFFLINE", "1")
        patched.setenv("HF_DATASETS_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def url(local: Local, export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that opens the folder of the tasks."""
    flags = ["--device", "cpu", "--dtype", "fp32"]
    serving = Serving(export, 64, concurrency=2, media=[local.tasks.parent], flags=flags)
    with Server(serving, tmp_path_factory.mktemp("server") / "log.txt") as server:
        yield server.url


def arguments(local: Local, out: Path, *more: str) -> list[str]:
    return [
        "--suite", "lmms", "--out", str(out), "--include", str(local.tasks), "--tasks",
        ",".join(local.own), "--lmms", str(ENVIRONMENT), "--frames", "64", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(local: Local, url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of all tasks, nothing being in the way."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(arguments(local, out, "--url", url, "--concurrency", "2")) == DONE
    return out


def answers(out: Path, row: str) -> dict[str, str]:
    return {name: item["answer"] for name, item in read_items(out)[row].items()}


def test_scores_are_those_of_the_own_evaluator_to_the_sample(
    local: Local, export: Path, undisturbed: Path, tmp_path: Path
) -> None:
    results = read_results(undisturbed)
    for row in results.rows:
        file = tmp_path / f"{row.row}.json"
        own = ["--checkpoint", str(export), "--suite", str(local.own[row.row]), "--device", "cpu"]
        assert main([*own, "--threads", "1", "--out", str(file)]) == DONE
        ours = json.loads(file.read_text())
        said = [sample["said"] for sample in ours["samples"]]
        assert [answers(undisturbed, row.row)[str(n)] for n in range(COUNT)] == said
        (score,) = [s["value"] for s in ours["scores"] if s["metric"] == "answers exact"]
        assert row.value == pytest.approx(score)
        assert (row.count, row.of, row.failed) == (COUNT, COUNT, 0)
    assert len(results.rows) == 3
    assert 0 < sum(row.value or 0 for row in results.rows) < 3


def start(command: list[str]) -> subprocess.Popen[str]:
    """The command, as a user starts it."""
    words = [sys.executable, "-m", "tools.evaluate", *command]
    return subprocess.Popen(words, cwd=REPO, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    """Until it is done, while the process runs."""
    until = time.monotonic() + 900
    while True:
        ended = process.poll() is not None
        if done():
            return
        assert not ended
        assert time.monotonic() < until
        time.sleep(0.02)


def lines(journal: Path) -> int:
    """Answers that have come."""
    return journal.read_text().count("\n") if journal.exists() else 0


class Halted:
    """An evaluation with two replicas that goes on only as far as a test lets it: processes are
    stopped and continued, so nothing depends on how fast anything is."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.process, self._log = start(command), log
        self._stopped: list[psutil.Process] = []

    def __enter__(self) -> Halted:
        return self

    def __exit__(self, *_: object) -> None:
        for one in (*self._stopped, self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()

    def child(self, program: str) -> psutil.Process | None:
        """The process that runs it; None where there is none."""
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, which `wait` tells
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.ZombieProcess):
                    if any(program in word for word in child.cmdline()):
                        return child
        return None

    def stop(self, process: psutil.Process) -> psutil.Process:
        process.suspend()
        self._stopped.append(process)
        return process

    def replicas(self) -> list[dict[str, Any]]:
        """As an administrator sees them; none before there is a server."""
        found = re.search(r"http://[\d.:]+", self._log.read_text()) if self._log.exists() else None
        if not found:
            return []
        try:
            answer = httpx.get(f"{found[0]}/admin/replicas", timeout=PATIENCE)
        except httpx.ConnectError:
            return []
        return cast(list[dict[str, Any]], answer.json()["replicas"])

    def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The first replica of which it is true."""
        found = list[dict[str, Any]]()

        def look() -> bool:
            found[:] = [one for one in self.replicas() if condition(one)]
            return bool(found)

        wait(self.process, look)
        return found[0]


def is_ready(number: int, replica: dict[str, Any]) -> bool:
    return replica["replica"] == number and bool(replica["state"] == "ready")


def is_another(before: dict[str, Any], replica: dict[str, Any]) -> bool:
    """Whether it is the next process of the same replica."""
    return replica["replica"] == before["replica"] and replica["pid"] not in (None, before["pid"])


def test_a_replica_and_a_server_that_are_killed_change_no_score(
    local: Local, export: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """What a killed replica was asked another one answers; where the server itself is killed, the
    run ends with what was done, and goes on from there, with however many replicas."""
    out = tmp_path / "out"
    command = arguments(
        local, out, "--checkpoint", str(export), "--tasks", "toy_video_mc", "--concurrency", "1",
        "--media", str(local.tasks.parent),
        "--server=--device cpu --dtype fp32 --limit_silence 3600",
    )  # fmt: skip
    journal, log = out / "lmms/toy_video_mc/answers.jsonl", out / "server.txt"
    with Halted([*command, "--replicas", "2"], log) as run:
        wait(run.process, lambda: run.child("lmms_runner") is not None)
        asking = run.child("lmms_runner")
        assert asking
        run.stop(asking)  # it imports for seconds before it asks
        for number in (0, 1):
            run.stop(psutil.Process(run.until(partial(is_ready, number))["pid"]))
        asking.resume()
        asked = run.until(lambda one: one["chats"])
        other = run.until(lambda one: one["chats"] and one["pid"] != asked["pid"])
        os.kill(asked["pid"], signal.SIGKILL)
        run.until(lambda one: one["pid"] == other["pid"] and one["chats"] == 2)
        wait(run.process, lambda: "ended (-9)" in log.read_text())
        again = run.until(partial(is_another, asked))
        run.stop(psutil.Process(again["pid"]))
        asking.suspend()
        psutil.Process(other["pid"]).resume()
        run.until(lambda one: one["replica"] == other["replica"] and not one["chats"])
        psutil.Process(other["pid"]).suspend()
        asking.resume()
        wait(run.process, lambda: lines(journal) == 2)
        run.until(lambda one: one["chats"])  # the next question
        server = run.child("inference.serve")
        assert server
        server.kill()
        _, said = run.process.communicate(timeout=PATIENCE)
        assert run.process.returncode == FAILED
    assert "toy_video_mc: the server ended with code -9" in said
    kept = journal.read_text().splitlines()
    assert len(kept) == 2
    assert main(command) == DONE
    assert journal.read_text().splitlines()[:2] == kept
    assert lines(journal) == COUNT
    (row,) = read_results(out).rows
    assert row == next(r for r in read_results(undisturbed).rows if r.row == row.row)
    assert answers(out, row.row) == answers(undisturbed, row.row)


def test_what_is_missing_has_no_score_and_a_killed_run_goes_on(
    local: Local, url: str, tmp_path: Path
) -> None:
    out, gone = tmp_path / "out", sorted((local.tasks.parent / "toy_video_mc").glob("*.mp4"))[1]
    hidden = gone.rename(tmp_path / "hidden.mp4")
    two = arguments(local, out, "--url", url, "--tasks", "toy_image_open,toy_video_mc")
    journal, process = out / "lmms/toy_video_mc/answers.jsonl", start(two)
    wait(process, lambda: lines(journal) >= 2)
    process.kill()
    process.communicate()
    answered = journal.read_text().splitlines()[:2]
    finished = (out / "lmms/toy_image_open/done.json").stat().st_mtime_ns
    assert main(two) == DONE
    assert (out / "lmms/toy_image_open/done.json").stat().st_mtime_ns == finished
    assert journal.read_text().splitlines()[:2] == answered
    assert lines(journal) == COUNT - 1
    image, video = read_results(out).rows
    assert (image.count, image.of, image.lacks) == (COUNT, COUNT, "")
    assert (video.count, video.of, video.lacks) == (COUNT - 1, COUNT, "1 no media")
    found = map(json.loads, (out / "items/toy_video_mc.jsonl").read_text().splitlines())
    (skipped,) = [item for item in found if "skipped" in item]
    assert str(gone) in skipped["detail"]
    shutil.move(hidden, gone)
    assert main(two) == DONE
    assert read_results(out).rows[1].count == COUNT


def test_failed_requests_are_counted_and_not_wrong_answers(
    local: Local, url: str, tmp_path: Path
) -> None:
    """The server refuses videos that lie outside the folders that it opens."""
    videos = sorted((local.tasks.parent / "toy_video_mc").glob("*.mp4"))[:2]
    for video in videos:
        elsewhere = shutil.move(video, tmp_path / video.name)
        video.symlink_to(elsewhere)
    few = ("--tasks", "toy_video_mc", "--limit", "2")
    try:
        assert main(arguments(local, tmp_path / "out", "--url", url, *few)) == FAILED
    finally:
        for video in videos:
            shutil.move(tmp_path / video.name, video)
    (row,) = read_results(tmp_path / "out").rows
    assert (row.value, row.count, row.of, row.failed) == (None, 0, 2, 2)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 56}}')
    with pytest.raises(BenchmarkError, match="the server ended with code 1"):
        Server(Serving(tmp_path, 16), tmp_path / "log.txt")
