"""Runs a task of lmms-eval in its own environment, and reads its results into our form."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from inference.evaluate.harness.benchmarks import LMMS_VERSION, Benchmark
from inference.evaluate.harness.lmms_runner import FAILED, LEFT_OUT, NO_KEY, SKIPPED
from inference.evaluate.harness.server import KEY, MODEL, last_words
from inference.evaluate.results import Item, Row

HERE = Path(__file__).parent
_RUNNER, _TASKS = HERE / "lmms_runner.py", HERE / "tasks"
_DONE = "done.json"
_VERSION = 2  # of how answers are scored: a task that was finished under another is scored again
_NO_MEDIA: Mapping[str, Mapping[str, list[str]]] = {"videos": {}, "pictures": {}}
_GRADES = ("score", "rating", "is_correct", "correct", "accuracy", "MRA:.5:.95:.05")
# Answers as their task has read them; `prediction` is often the whole answer.
_PREDICTIONS = ("pred_answer", "parsed_pred", "pred")
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

    A finished task is not run again, unless it was scored in another way. Of a task that was
    stopped, or in which requests failed, only items without an answer are asked again. `check` is
    called while the task runs, and may raise.

    Raises TaskFailed, and what `check` raises.
    """
    folder = harness.out / benchmark.task
    if finished(folder, harness.limit):
        return read_task(folder / "run", benchmark)
    _run(harness, benchmark, folder, url, check)
    row, items = read_task(folder / "run", benchmark)
    if not row.failed and not row.skipped:
        (folder / _DONE).write_text(json.dumps(_finish(harness.limit)) + "\n")
    return row, items


def finished(folder: Path, limit: int | None) -> bool:
    """Whether a task has been run to its end with the same limit, and scored as now."""
    try:
        return bool(json.loads((folder / _DONE).read_text()) == _finish(limit))
    except (OSError, ValueError):
        return False


def _finish(limit: int | None) -> dict[str, int | None]:
    return {"limit": limit, "version": _VERSION}


def command(harness: Harness, benchmark: Benchmark, folder: Path, url: str) -> list[str]:
    """Writes the settings of lmms_runner.py into the folder; returns the command that runs it."""
    settings = {
        "journal": str(folder / "answers.jsonl"), "media": str(folder / "shown.json"),
        "key_env": KEY,
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
        "--process_docs_parallel", "1",  # some tasks draw numbers, which threads share
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
    environment.setdefault("OPENAI_API_KEY", NO_KEY)  # of judges: the server's key is not theirs
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
        media_file = folder.parent / "shown.json"
        media = json.loads(media_file.read_text()) if media_file.exists() else _NO_MEDIA
        items = [_item(json.loads(line), benchmark, media) for line in file]
    metric, value = benchmark.metric, None
    if any("metrics" in item for item in items):
        metric, value = _value(_one(folder, "*_results.json"), benchmark)
    # What a task keeps for another of its metrics alone is of another row: SEEDBench's clips.
    items = [item for item in items if "metrics" not in item or metric in item["metrics"]]
    kept = [item["metrics"][metric] for item in items if "metrics" in item]
    if not kept:
        value = None
    elif benchmark.mean_over is not None:
        value = benchmark.scale * _mean(kept, benchmark.mean_over)
    for item in items:
        _grade(item, metric)
    failed = sum("failed" in item for item in items)
    skipped = dict(sorted(Counter(item["skipped"] for item in items if "skipped" in item).items()))
    row = Row(benchmark.name, metric, value, len(kept), len(items), failed, skipped, benchmark.seed)
    return row, items


def _mean(kept: Sequence[Any], field: str) -> float:
    """The mean score of what a task keeps for its items; where `field` is not empty, first over
    those that share its value."""
    groups: dict[Any, list[float]] = {}
    for value in kept:
        groups.setdefault(value[field] if field else "", []).append(grade(value) or 0.0)
    return fmean(fmean(group) for group in groups.values())


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


def _item(
    sample: dict[str, Any], benchmark: Benchmark, media: Mapping[str, Mapping[str, list[str]]]
) -> Item:
    name = str(sample["doc_id"])
    # `resps` is there where a filter of the task has changed the answer.
    answer = _text(sample.get("resps", sample.get("filtered_resps")))
    item: Item = {
        "id": name,
        "row": benchmark.name,
        "question": str(sample.get("input", "")),
        "reference": str(sample.get("target", "")),
        "media": media["videos"].get(name) or _paths(sample.get("input_media")),
        "pictures": media["pictures"].get(name, []),
    }
    if answer.startswith(FAILED):
        return item | {"failed": answer}
    if answer.startswith(SKIPPED):
        return item | {"skipped": "no media", "detail": answer.removeprefix(SKIPPED).strip()}
    if LEFT_OUT in sample:
        return item | {"answer": answer, "skipped": sample[LEFT_OUT]}
    return item | {"answer": answer, "metrics": sample}


def _grade(item: Item, metric: str) -> None:
    """Replaces an item's `metrics`, all of lmms-eval's sample, by its score."""
    if "metrics" in item:
        item["score"] = score = grade(item.pop("metrics").get(metric))
        if score in (0.0, 1.0):
            item["correct"] = bool(score)


def grade(value: Any) -> float | None:
    """An item's score from the value that its task keeps for the metric.

    The value is a number, or a dict with a number, or with the answer as the task has read it and
    the reference. None: it is none of these; the item has no score of its own.
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
    if not isinstance(prediction, str | int) or not isinstance(reference, str | int):
        return None
    return float(_plain(prediction) == _plain(reference))


def _plain(value: Any) -> str:
    return str(value).strip().lower()


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
