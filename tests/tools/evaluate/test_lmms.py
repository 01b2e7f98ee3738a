"""lmms-eval from its package asks our server about local tasks, and scores as we do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from data_pipeline.commands import DONE, FAILED
from inference.evaluate.harness.server import Server, Serving
from inference.evaluate.results import BenchmarkError, read_items, read_results
from tests.tools.evaluate.local_tasks import Local, write_tasks
from tests.torchrun import REPO
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


def test_a_replica_and_a_server_that_are_killed_change_no_score(
    local: Local, export: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """What a killed replica was asked another one answers; where the server itself is killed, the
    run ends with what was done, and goes on from there, with however many replicas."""
    out = tmp_path / "out"
    command = arguments(
        local, out, "--checkpoint", str(export), "--tasks", "toy_video_mc", "--concurrency", "1",
        "--media", str(local.tasks.parent), "--server=--device cpu --dtype fp32",
    )  # fmt: skip
    journal, log = out / "lmms/toy_video_mc/answers.jsonl", out / "server.txt"
    process = start([*command, "--replicas", "2"])
    wait(process, lambda: lines(journal) >= 1)
    address = re.search(r"http://[\d.:]+", log.read_text())
    assert address
    replicas = httpx.get(f"{address[0]}/admin/replicas", timeout=60).json()["replicas"]
    assert len(replicas) == 2
    os.kill(max(replicas, key=lambda one: one["chats"])["pid"], signal.SIGKILL)
    wait(process, lambda: lines(journal) >= 4)
    kept = journal.read_text().splitlines()[:4]
    (server,) = [
        child
        for child in psutil.Process(process.pid).children()
        if "inference.serve" in child.cmdline()
    ]
    server.kill()
    _, said = process.communicate(timeout=300)
    assert process.returncode == FAILED
    assert "toy_video_mc: the server ended with code -9" in said
    assert "ended (-9)" in log.read_text(), "the replica, before"
    assert main(command) == DONE
    assert journal.read_text().splitlines()[:4] == kept
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
