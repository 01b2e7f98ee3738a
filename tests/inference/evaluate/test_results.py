"""What is done stays done, what failed is asked again, and the table says of how many it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.commands import DONE, FAILED
from inference.evaluate.results import (
    BenchmarkError,
    EvaluationRun,
    Item,
    Results,
    Row,
    digest_of,
    mean_row,
    read_items,
    read_results,
)


def start(out: Path, **settings: object) -> EvaluationRun:
    return EvaluationRun(out, "toy", "seed25", settings)


def test_a_run_goes_on_behind_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        file = run.items("MLVU(dev)/a")
        file.add({"id": "1", "score": 1.0, "answer": "Straße\r\n\x85 "})
        file.add({"id": "2", "failed": "HTTP 503"})
        file.add({"id": "3", "skipped": "no media"})
        file.add({"id": "4", "score": 0.0})
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[: whole.rindex(b"score") + 3])
    with start(tmp_path) as run:
        again = run.items("MLVU(dev)/a")
        assert [name in again for name in "1234"] == [True, False, False, False]
        again.add({"id": "4", "score": 0.0})
        with pytest.raises(ValueError, match="'1'"):
            again.add({"id": "1", "score": 0.0})
    lines = [json.loads(line) for line in file.path.read_text().split("\n")[:-1]]
    assert [line["id"] for line in lines] == ["1", "4"]
    assert read_items(tmp_path)["MLVU(dev)/a"]["1"]["answer"] == "Straße\r\n\x85 "


def test_a_score_is_of_the_items_that_have_one_and_says_so(tmp_path: Path) -> None:
    items: list[Item] = [
        {"id": "1", "score": 1}, {"id": "2", "score": 0}, {"id": "3", "skipped": "no media"},
        {"id": "4", "failed": "reset"}, {"id": "5", "score": 1},
    ]  # fmt: skip
    row = mean_row("POPE", "accuracy", items, 7, beside={"seed": 88.17})
    assert row.value == pytest.approx(2 / 3)
    assert (row.count, row.of, row.failed, row.skipped) == (3, 7, 1, {"no media": 1})
    assert row.lacks == "1 failed, 2 not asked, 1 no media"
    with start(tmp_path, frames=64) as run:
        results = run.finish([row])
    assert results.exit_code == FAILED
    assert read_results(tmp_path) == results
    for page in ("results.md", "results.html"):
        assert "1 failed, 2 not asked, 1 no media" in (tmp_path / page).read_text()


def test_only_failures_and_missing_answers_fail_a_run() -> None:
    def code(**counts: object) -> int:
        return Results("m", "s", {}, [Row("r", "x", 0.5, 2, 3, **counts)]).exit_code  # type: ignore[arg-type]

    assert code(skipped={"no media": 1}) == DONE
    assert code(failed=1) == code() == FAILED


def test_a_folder_takes_one_run_at_a_time_and_of_one_kind(tmp_path: Path) -> None:
    writing = pytest.raises(BenchmarkError, match="another process is writing it")
    with start(tmp_path, frames=64, limit=2), writing:
        start(tmp_path, frames=64)
    with start(tmp_path, frames=64, limit=8):
        pass
    with pytest.raises(BenchmarkError, match="was begun with frames 64, not 32"):
        start(tmp_path, frames=32)


@pytest.mark.parametrize(("text", "said"), [("{", "Expecting"), ('{"rows": [{}]}', "missing")])
def test_results_in_another_form_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BenchmarkError, match=r"results\.json: No such file"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(BenchmarkError, match=rf"results\.json: is not .*{said}"):
        read_results(tmp_path)


def test_other_weights_in_the_same_place_are_another_model(tmp_path: Path) -> None:
    export, out = tmp_path / "export", tmp_path / "out"
    export.mkdir()
    weights, size = export / "model.safetensors", 3 * 2**20

    def begin() -> None:
        with EvaluationRun(out, str(export), "toy", {}):
            pass

    weights.write_bytes(bytes(size))
    begin()
    begin()
    weights.write_bytes(bytes(size - 1) + b"1")
    with pytest.raises(BenchmarkError, match=r"out: was begun with weights '\w+', not '\w+'"):
        begin()
    # In the middle: what comes last may have been frozen in training.
    weights.write_bytes(bytes(size // 2) + b"1" * 2**18 + bytes(size - size // 2 - 2**18))
    with pytest.raises(BenchmarkError, match="was begun with weights"):
        begin()
    weights.write_bytes(bytes(size))
    begin()
    # An export says itself what is in all of its files.
    manifest = {"files": {weights.name: {"sha256": "abc"}}}
    (export / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BenchmarkError, match="was begun with weights"):
        begin()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(BenchmarkError, match=r"out: cannot be written: File exists"):
        start(tmp_path / "out")


def test_files_of_questions_stay_as_they_were_and_more_may_come(tmp_path: Path) -> None:
    file = tmp_path / "zerobench.tsv"
    file.write_text("index\tquestion\n1\tWhat?\n")
    out = tmp_path / "out"
    with start(out, questions={}):
        pass
    with start(out, questions={"ZeroBench": digest_of(file)}):
        pass
    with start(out, questions={}):  # other rows are asked
        pass
    file.write_text("index\tquestion\n1\tWhere?\n")
    with pytest.raises(BenchmarkError, match=r"was begun with questions .*: choose another --out"):
        start(out, questions={"ZeroBench": digest_of(file)})
    before = digest_of(tmp_path)
    (tmp_path / "utils.py").write_text("# another way to read an answer")
    assert digest_of(tmp_path) != before


def test_the_weights_of_a_server_are_those_of_the_run(tmp_path: Path) -> None:
    url = "http://127.0.0.1:8000"
    with EvaluationRun(tmp_path, url, "seed25", {}, "1b9c"):
        pass
    with EvaluationRun(tmp_path, url, "seed25", {}, "1b9c"):
        pass
    with pytest.raises(BenchmarkError, match="was begun with weights '1b9c', not '77aa'"):
        EvaluationRun(tmp_path, url, "seed25", {}, "77aa")
