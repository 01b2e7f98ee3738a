"""Runs a task of lmms-eval in its own environment, and reads its results into our form."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.evaluate.harness.benchmarks import LMMS_VERSION, Benchmark
from inference.evaluate.harness.lmms_runner import FAILED, SKIPPED
from inference.evaluate.harness.server import KEY, MODEL, last_words
from inference.evaluate.results import Item, Row

HERE = Path(__file__).parent
_RUNNER, _TASKS = HERE / "lmms_runner.py", HERE / "tasks"
_DONE = "done.json"
_GRADES = ("score", "rating", "match_success", "is_correct", "correct", "accuracy")
_PREDICTIONS = ("pred_answer", "parsed_pred", "pred", "prediction")
_REFERENCES = ("answer", "ground_truth", "gt_answer", "gt")


@dataclass(frozen=True)
class Harness:
    """How lmms-eval is run."""

    python: Path  # interpreter of its environment
    out: Path  # folder of its files
    fps: float  # of videos
    max_frames: int  # of a video
    max_tokens: int  # of an answer
    concurrency: int  # requests at a time
    include: Path | None = None  # folder of tasks besides lmms-eval's own; None: harness/tasks
    limit: int | None = None  # items of a task


class TaskFailed(Exception):
    """lmms-eval could not run a task; the text has the last line of its log."""


def run_task(
    harness: Harness, benchmark: Benchmark, url: str, check: Callable[[], None]
) -> tuple[Row, list[Item]]:
    """Runs a task against the server at `url`; returns its row and items.

    A finished task is not run again. Of a task that was stopped, or in which requests failed, only
    items without an answer are asked again. `check` is called while the task runs, and may raise.

    Raises TaskFailed, and what `check` raises.
    """
    folder = harness.out / benchmark.task
    if finished(folder, harness.limit):
        return read_task(folder / "run", benchmark)
    _run(harness, benchmark, folder, url, check)
    row, items = read_task(folder / "run", benchmark)
    if not row.failed and not row.skipped:
        (folder / _DONE).write_text(json.dumps({"limit": harness.limit}) + "\n")
    return row, items


def finished(folder: Path, limit: int | None) -> bool:
    """Whether a task has been run to its end with the same limit."""
    try:
        return bool(json.loads((folder / _DONE).read_text())["limit"] == limit)
    except (OSError, ValueError, KeyError):
        return False


def command(harness: Harness, benchmark: Benchmark, folder: Path, url: str) -> list[str]:
    """Writes the settings of lmms_runner.py into the folder; returns the command that runs it."""
    settings = {
        "journal": str(folder / "answers.jsonl"), "media": str(folder / "media.json"),
        "fps": harness.fps, "max_frames": harness.max_frames, "max_tokens": harness.max_tokens,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings) + "\n")
    model = {
        "model": MODEL, "base_url": f"{url}/v1", "pass_video_url": True,
        "num_concurrent": harness.concurrency, "prefix_aware_queue": False,
    }  # fmt: skip
    words = [
        str(harness.python), str(_RUNNER), str(folder / "settings.json"), "--model", "openai",
        "--model_args", ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks", benchmark.task, "--include_path", str(harness.include or _TASKS),
        "--batch_size", "1", "--log_samples", "--output_path", str(folder / "run"),
    ]  # fmt: skip
    return words + (["--limit", str(harness.limit)] if harness.limit else [])


def _run(
    harness: Harness, benchmark: Benchmark, folder: Path, url: str, check: Callable[[], None]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _DONE).unlink(missing_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    words = command(harness, benchmark, folder, url)
    home = os.environ.get("HF_HOME") or str(Path("~/.cache/huggingface").expanduser())
    # Some tasks find their videos only where HF_HOME is set; a proxy is not for this machine.
    environment = {**os.environ, "HF_HOME": home, "NO_PROXY": "127.0.0.1,localhost"}
    environment["OPENAI_API_KEY"] = os.environ.get(KEY) or "none"  # an argument would be in its log
    environment.pop("PYTHONPATH", None)
    log = folder / "log.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None:
                check()
                try:
                    process.wait(1.0)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        raise TaskFailed(
            f"lmms-eval ended with code {process.returncode}: {last_words(log)} ({log})"
        )


def read_task(folder: Path, benchmark: Benchmark) -> tuple[Row, list[Item]]:
    """Reads the row and the items of a task from the files of lmms-eval.

    Raises TaskFailed where a file or the metric is missing.
    """
    samples = _one(folder, f"*_samples_{benchmark.task}.jsonl")
    with samples.open(encoding="utf-8") as file:
        media_file = folder.parent / "media.json"
        media = json.loads(media_file.read_text()) if media_file.exists() else {}
        items = [_item(json.loads(line), benchmark, media) for line in file]
    failed = sum("failed" in item for item in items)
    skipped = sum("skipped" in item for item in items)
    count = len(items) - failed - skipped
    metric, value = benchmark.metric, None
    if count:
        metric, value = _value(_one(folder, "*_results.json"), benchmark)
    for item in items:
        _grade(item, metric)
    missing = {"no media": skipped} if skipped else {}
    row = Row(benchmark.name, metric, value, count, len(items), failed, missing, benchmark.seed)
    return row, items


def _value(path: Path, benchmark: Benchmark) -> tuple[str, float]:
    """The name and value of a task's metric, in the unit of the seed's table."""
    found = json.loads(path.read_text())["results"].get(benchmark.task, {})
    for name, value in found.items():
        metric = name.partition(",")[0]
        wanted = metric == benchmark.metric if benchmark.metric else not metric.endswith("_stderr")
        if wanted and isinstance(value, int | float) and not isinstance(value, bool):
            return metric, float(value) * benchmark.scale
    raise TaskFailed(f"{path}: has no {benchmark.metric} of {benchmark.task}: {', '.join(found)}")


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise TaskFailed(f"{folder}: lmms-eval has written no {pattern}")
    return found[-1]


def _item(sample: dict[str, Any], benchmark: Benchmark, media: dict[str, list[str]]) -> Item:
    name = str(sample["doc_id"])
    # `resps` is there where a filter of the task has changed the answer.
    answer = _text(sample.get("resps", sample.get("filtered_resps")))
    item: Item = {
        "id": name,
        "row": benchmark.name,
        "question": str(sample.get("input", "")),
        "reference": str(sample.get("target", "")),
        "media": media.get(name) or _paths(sample.get("input_media")),
    }
    if answer.startswith(FAILED):
        return item | {"failed": answer}
    if answer.startswith(SKIPPED):
        return item | {"skipped": "no media", "detail": answer.removeprefix(SKIPPED).strip()}
    return item | {"answer": answer, "metrics": sample}


def _grade(item: Item, metric: str) -> None:
    """Replaces an item's `metrics`, all of lmms-eval's sample, by its score."""
    if "metrics" in item:
        item["score"] = score = grade(item.pop("metrics").get(metric))
        if score in (0.0, 1.0):
            item["correct"] = bool(score)


def grade(value: Any) -> float | None:
    """An item's score from the value that its task keeps for the metric.

    The value is a number, or a dict with a number or with prediction and reference. None: it is
    none of these; the item has no score of its own.
    """
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, dict):
        return None
    for name in _GRADES:
        if isinstance(value.get(name), bool | int | float):
            return float(value[name])
    prediction, reference = (
        next((value[n] for n in names if n in value), None) for names in (_PREDICTIONS, _REFERENCES)
    )
    if prediction is None or reference is None:
        return None
    return float(_plain(prediction) == _plain(reference))


def _plain(value: Any) -> str:
    return str(value).strip().strip("()").lower()


def _text(value: Any) -> str:
    """The text of an answer, which samples hold inside lists."""
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else ""


def _paths(media: Any) -> list[str]:
    """The entries of a sample's media that are paths of files."""
    found = media if isinstance(media, list) else []
    return [path for path in found if isinstance(path, str) and os.path.isfile(path)]


def settings_of(harness: Harness, benchmark: Benchmark, resolution: str) -> dict[str, Any]:
    """A row's settings for the table: frames, resolution and prompt."""
    frames = f"{harness.fps:g}/s, at most {harness.max_frames}" if benchmark.video else ""
    prompt = f"lmms-eval {LMMS_VERSION}, {benchmark.task}"
    return {"frames": frames, "resolution": resolution, "prompt": prompt}
