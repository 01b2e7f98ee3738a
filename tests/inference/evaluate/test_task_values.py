"""The value of a task is taken over what was answered, and each item has the score of its task.

What samples hold was written by lmms-eval 0.7.3.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inference.evaluate.harness.benchmarks import chosen
from inference.evaluate.harness.lmms import finished, read_task
from inference.evaluate.harness.lmms_runner import Completions
from inference.evaluate.results import Item, Row

FAILED = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error."
Kept = dict[str, Any] | float | str | None  # None: the request failed; a text: why it is left out


def written(
    folder: Path, row: str, kept: Sequence[Kept], value: float, metric: str = ""
) -> tuple[Row, list[Item]]:
    """What comes of files of lmms-eval: `kept` for the metric of each item, `value` for all."""
    (benchmark,) = chosen([row])
    metric, run = metric or benchmark.metric, folder / "run"
    run.mkdir()
    with (run / f"1_samples_{benchmark.task}.jsonl").open("w") as file:
        for number, one in enumerate(kept):
            sample: dict[str, Any] = {"doc_id": number, "target": "A", "input": "Which?"}
            if one is None:
                sample["filtered_resps"] = FAILED
            elif isinstance(one, str):
                sample |= {"filtered_resps": "It may be A", "moss_left_out": one}
            else:
                sample |= {"filtered_resps": "A", metric: one}
            file.write(json.dumps(sample) + "\n")
    results = {"results": {benchmark.task: {f"{metric},none": value}}}
    (run / "1_results.json").write_text(json.dumps(results))
    return read_task(run, benchmark)


def ocr(score: int) -> dict[str, Any]:
    return {"question_type": "Doc-oriented VQA", "score": score, "ground_truth": ["A"]}


def test_ocrbench_is_of_1000_for_however_many_were_answered(tmp_path: Path) -> None:
    """lmms-eval's value is the number of right answers over 1000."""
    row, _ = written(tmp_path, "OCRBench", [ocr(1), ocr(1), ocr(1), ocr(0), None], 0.003)
    assert (row.value, row.count, row.of, row.failed) == (750, 4, 5, 1)


def test_mlvu_is_the_mean_of_the_kinds_that_were_answered(tmp_path: Path) -> None:
    """lmms-eval's value has 0 for each of its seven kinds without an answer."""
    answers = [("plotQA", "A"), ("plotQA", "B"), ("plotQA", "A"), ("plotQA", "A"), ("ego", "B")]
    kept = [{"task_type": task, "pred_answer": said, "answer": "A"} for task, said in answers]
    row, items = written(tmp_path, "MLVU(dev)", kept, 100 * 0.75 / 7)
    assert row.value == pytest.approx(100 * (0.75 + 0) / 2)
    assert [item["correct"] for item in items] == [True, False, True, True, False]


def test_seedbench_counts_its_pictures_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines: list[dict[str, Any]] = [
        {"doc_id": 0, "seed_image": {"pred": "A", "answer": "A"}, "seed_all": {}},
        {"doc_id": 1, "seed_video": {"pred": "A", "answer": "B"}, "seed_all": {}},
        {"doc_id": 2, "seed_image": {"pred": "C", "answer": "B"}, "seed_all": {}},
    ]
    samples = [{"target": "A", "input": "?", "filtered_resps": "A"} | line for line in lines]
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (tmp_path / "run/1_samples_seedbench.jsonl").write_text(text)
    results = {"results": {"seedbench": {"seed_image,none": 0.5, "seed_video,none": 0.0}}}
    (tmp_path / "run/1_results.json").write_text(json.dumps(results))
    row, items = read_task(tmp_path / "run", chosen(["SEEDBench"])[0])
    assert (row.value, row.count, row.of, row.missing) == (50, 2, 2, 0)
    assert [item["id"] for item in items] == ["0", "2"]


def test_an_answer_that_only_a_judge_could_read_is_left_out(tmp_path: Path) -> None:
    """lmms-eval counts it as wrong, after it has asked for a judge in vain."""
    kept: list[Kept] = [{"rating": 1, "match_success": True}, "no judge", "no judge"]
    row, items = written(tmp_path, "TempCompass MC", kept, 100.0)
    assert (row.value, row.count, row.of, row.skipped) == (100, 1, 3, {"no judge": 2})
    assert items[1]["answer"] == "It may be A"
    assert "score" not in items[1]


def test_a_row_without_any_answer_has_no_value(tmp_path: Path) -> None:
    row, _ = written(tmp_path, "TempCompass YN", ["no judge", None], 0.0)
    assert (row.value, row.count, row.of) == (None, 0, 2)


def test_a_task_that_was_scored_in_another_way_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text('{"limit": null}')  # as before answers had a version
    assert not finished(tmp_path, None)
    (tmp_path / "done.json").write_text('{"limit": 3, "version": 2}')
    assert finished(tmp_path, 3)
    assert not finished(tmp_path, None)


def test_another_video_under_the_same_name_is_asked_about_anew(tmp_path: Path) -> None:
    video, sent = tmp_path / "a b.mp4", list[Any]()

    def create(**request: Any) -> Any:
        sent.append(request)
        message = SimpleNamespace(content=f"answer {len(sent)}")
        return SimpleNamespace(choices=[SimpleNamespace(message=message)], usage=None)

    settings = {
        "journal": str(tmp_path / "answers.jsonl"), "fps": 1, "max_frames": 2, "max_tokens": 8,
    }  # fmt: skip

    def ask() -> str:
        part = {"type": "video_url", "video_url": {"url": f"file://{video}"}}
        made = Completions(SimpleNamespace(create=create), settings)
        reply = made.create(messages=[{"content": [part]}], max_tokens=8)
        return str(reply.choices[0].message.content)

    video.write_bytes(b"one")
    assert [ask(), ask()] == ["answer 1", "answer 1"]
    video.write_bytes(b"another")
    assert [ask(), ask()] == ["answer 2", "answer 2"]
