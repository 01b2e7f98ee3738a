"""lmms-eval from its package asks our server about local tasks, and scores as we do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.commands import FAILED
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


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


def arguments(local: Local, export: Path, out: Path, *more: str) -> list[str]:
    return [
        "--suite", "lmms", "--checkpoint", str(export), "--out", str(out), "--include",
        str(local.tasks), "--tasks", ",".join(local.own), "--media", str(local.tasks.parent),
        "--lmms", str(ENVIRONMENT), "--concurrency", "2", "--frames", "64",
        "--server=--device cpu --dtype fp32", *more,
    ]  # fmt: skip


def test_scores_are_those_of_the_own_evaluator_to_the_sample(
    local: Local, export: Path, tmp_path: Path
) -> None:
    assert main(arguments(local, export, tmp_path / "out")) == 0
    results, items = read_results(tmp_path / "out"), read_items(tmp_path / "out")
    for row in results.rows:
        file = tmp_path / f"{row.row}.json"
        own = ["--checkpoint", str(export), "--suite", str(local.own[row.row]), "--device", "cpu"]
        assert main([*own, "--threads", "1", "--out", str(file)]) == 0
        ours = json.loads(file.read_text())
        said = [sample["said"] for sample in ours["samples"]]
        assert [items[row.row][str(n)]["answer"] for n in range(COUNT)] == said
        (score,) = [s["value"] for s in ours["scores"] if s["metric"] == "answers exact"]
        assert row.value == pytest.approx(score)
        assert (row.count, row.of, row.failed) == (COUNT, COUNT, 0)
    assert 0 < sum(row.value or 0 for row in results.rows) < 3


def test_what_is_missing_has_no_score_and_a_killed_run_goes_on(
    local: Local, export: Path, tmp_path: Path
) -> None:
    out, gone = tmp_path / "out", sorted((local.tasks.parent / "toy_video_mc").glob("*.mp4"))[1]
    hidden = gone.rename(tmp_path / "hidden.mp4")
    two = arguments(local, export, out, "--tasks", "toy_image_open,toy_video_mc")
    process = subprocess.Popen([sys.executable, "-m", "tools.evaluate", *two], cwd=REPO)
    journal, until = out / "lmms/toy_video_mc/answers.jsonl", time.monotonic() + 400
    while not journal.exists() or journal.read_text().count("\n") < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    process.wait()
    answered = journal.read_text().splitlines()[:2]
    finished = (out / "lmms/toy_image_open/done.json").stat().st_mtime_ns
    assert main(two) == 0
    assert (out / "lmms/toy_image_open/done.json").stat().st_mtime_ns == finished
    assert journal.read_text().splitlines()[:2] == answered
    assert len(journal.read_text().splitlines()) == COUNT - 1
    image, video = read_results(out).rows
    assert (image.count, image.of, image.lacks) == (COUNT, COUNT, "")
    assert (video.count, video.of, video.lacks) == (COUNT - 1, COUNT, "1 no media")
    lines = map(json.loads, (out / "items/toy_video_mc.jsonl").read_text().splitlines())
    (skipped,) = [item for item in lines if "skipped" in item]
    assert str(gone) in skipped["detail"]
    shutil.move(hidden, gone)
    assert main(two) == 0
    assert read_results(out).rows[1].count == COUNT


def test_failed_requests_are_counted_and_not_wrong_answers(
    local: Local, export: Path, tmp_path: Path
) -> None:
    """The server refuses pictures of more pixels than any of these has less one."""
    few = arguments(local, export, tmp_path / "out", "--tasks", "toy_image_mc", "--limit", "2")
    assert main([*few, "--server=--device cpu --dtype fp32 --limit_pixels 10"]) == FAILED
    (row,) = read_results(tmp_path / "out").rows
    assert (row.value, row.count, row.of, row.failed) == (None, 0, 2, 2)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 56}}')
    with pytest.raises(BenchmarkError, match="the server ended with code 1"):
        Server(Serving(tmp_path, 16), tmp_path / "log.txt")
