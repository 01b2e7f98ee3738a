"""What stands between lmms-eval, VLMEvalKit's TSV and our server."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.synthesis.config import EndpointConfig
from inference.engine.load import load_engine
from inference.evaluate.harness.benchmarks import ROWS, Benchmark, chosen
from inference.evaluate.harness.lmms import TaskFailed, grade, read_task
from inference.evaluate.harness.lmms_runner import Journal, file_url, missing
from inference.evaluate.harness.server import (
    MODEL,
    ExternalServer,
    Server,
    Serving,
    check_weights,
    weights_at,
)
from inference.evaluate.harness.zerobench import ask, is_right, read_tsv
from inference.evaluate.results import BenchmarkError, EvaluationRun, ItemFile
from inference.export_info import weights_of
from inference.serve.limits import Limits
from tests.inference.serve.serving import Running, jpeg, serving
from tests.inference.tiny import SIZE


def test_the_table_has_the_seeds_rows() -> None:
    assert len(ROWS) == 25
    assert len({row.name for row in ROWS}) == 25
    # The sums of the two columns as they were published.
    assert sum(row.realtime or 0 for row in ROWS) == pytest.approx(2010.79)
    assert sum(row.sft or 0 for row in ROWS) == pytest.approx(2013.04)
    assert [row.name for row in chosen(["mlvu_dev", "V*"])] == ["V*", "MLVU(dev)"]
    with pytest.raises(ValueError, match="MMLU: is no row of seed25: OCRBench, "):
        chosen(["MMLU"])


def test_a_journal_keeps_whole_lines(tmp_path: Path) -> None:
    path = str(tmp_path / "answers.jsonl")
    journal = Journal(path)
    journal.add("a", ["Über\n\u2028", 3, 4])
    journal.add("b", ["B", 1, 1])
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-4])
    again = Journal(path)
    assert again.known == {"a": ["Über\n\u2028", 3, 4]}
    again.add("c", ["C", 0, 0])
    assert set(Journal(path).known) == {"a", "c"}


def test_paths_of_videos_survive_as_urls(tmp_path: Path) -> None:
    path = tmp_path / "50% #1?.mp4"
    path.touch()
    assert file_url(f"file://{path}") == path.as_uri()
    assert file_url("https://host/a.mp4") == "https://host/a.mp4"

    def asked(url: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "video", "url": url}, {"type": "text"}]}]

    assert missing(asked(str(path))) == []
    assert missing(asked(path.as_uri())) == []
    assert missing(asked(f"{path}4")) == [f"{path}4"]
    assert missing(asked("https://host/a.mp4")) == []


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0), (False, 0.0), ({"question_id": 3, "score": 0.5}, 0.5),
        ({"pred_answer": "b", "answer": "B"}, 1.0), ({"pred": 2, "ground_truth": "3"}, 0.0),
        ({"submission": "x"}, None), (None, None), ("B", None),
        # Whole answers, and answers in a list, only their tasks can read: MMBench, MMMU.
        ({"prediction": "B. cat", "answer": "B"}, None),
        ({"parsed_pred": ["B"], "answer": "B"}, None),
        ({"pred": "(B)", "answer": "B"}, 0.0),  # MUIRBench
        # VSI-Bench: a number that is a quarter off has 5 of 10 points of mean relative accuracy.
        ({"prediction": "5", "ground_truth": "4", "MRA:.5:.95:.05": 0.5}, 0.5),
    ],
)  # fmt: skip
def test_an_items_score_is_what_its_task_keeps(value: Any, score: float | None) -> None:
    assert grade(value) == score


def test_a_failed_request_is_no_wrong_answer(tmp_path: Path) -> None:
    """Lines as lmms-eval writes them."""
    run = tmp_path / "run/moss-video"
    run.mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"doc_id": 0, "target": "A", "input": "Which?", "filtered_resps": "A", "acc": 1.0},
        {"doc_id": 1, "target": "B", "input": "Which?", "resps": "It is A", "filtered_resps": "A",
         "acc": 0.0},
        {"doc_id": 2, "target": "C", "input": "?", "filtered_resps": "L",
         "resps": ["[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error."]},
        {"doc_id": 3, "target": "D", "input": "?",
         "filtered_resps": "[MOSS_SKIPPED] no media: /v/3.mp4"},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "20261126_samples_t.jsonl").write_text(text)
    results = {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.5}}}
    (run / "20261126_results.json").write_text(json.dumps(results))
    shown = {"videos": {"1": ["/v/1.mp4"]}, "pictures": {"0": ["ab"]}}
    (tmp_path / "shown.json").write_text(json.dumps(shown))
    row, items = read_task(tmp_path / "run", Benchmark("T", "t", "acc", 100, 40.0, 41.0))
    assert (row.value, row.count, row.of) == (50.0, 2, 4)
    assert (row.failed, row.skipped) == (1, {"no media": 1})
    assert row.beside == {"seed, realtime": 40.0, "seed, sft": 41.0}
    assert [(item.get("score"), item.get("correct")) for item in items] == [
        (1.0, True), (0.0, False), (None, None), (None, None),
    ]  # fmt: skip
    assert (items[1]["media"], items[1]["answer"]) == (["/v/1.mp4"], "It is A")
    with pytest.raises(TaskFailed, match="has no f1 of t: alias, acc,none"):
        read_task(tmp_path / "run", Benchmark("T", "t", "f1"))
    with pytest.raises(TaskFailed, match=r"has written no \*_samples_u\.jsonl"):
        read_task(tmp_path / "run", Benchmark("U", "u"))


# The references of VLMEvalKit: `ans.strip().lower() in` the last braces of the answer.
@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [
        ("So {Seven}.", "seven ", True), ("{6} no, {17}", "7", True), ("7", "7", False),
        ("{7} then {8}", "7", False), ("{{7}}", "7", True), ("", "7", False),
    ],
)  # fmt: skip
def test_zerobench_scores_as_vlmevalkit(said: str, wanted: str, right: bool) -> None:
    assert is_right(said, wanted) is right


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=2)
    with serving(engine, Limits(), stage="sft") as running:
        yield running


def tsv(path: Path, *rows: tuple[str, str, str, str]) -> Path:
    lines = ["\t".join(row) for row in (("index", "image", "question", "answers"), *rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_zerobench_is_asked_from_its_file_and_goes_on(server: Running, tmp_path: Path) -> None:
    image, other = (base64.b64encode(jpeg(n)).decode() for n in (3, 4))
    path = tsv(
        tmp_path / "z.tsv",
        ("1", image, '"What ""is"" it?"', "x"), ("2", "1", "And this?", "y"),
        ("3", f"['{image}', '{other}']", "Which?", "z"), ("4", "", "Nothing?", "w"),
    )  # fmt: skip
    questions = read_tsv(path)
    assert [question.images for question in questions] == [(image,), (image,), (image, other), ()]
    assert questions[0].text == 'What "is" it?'
    assert len(read_tsv(path, 2)) == 2
    with EvaluationRun(tmp_path / "out", "tiny", "seed25", {}) as run:
        file = run.items("Z")
        config = EndpointConfig(f"{server.http}/v1", MODEL, max_tokens=4, concurrency=2)
        ask(questions[:1], file, config, "Z", lambda: None)
        assert list(file.items) == ["1"]
        ask(questions, file, config, "Z", lambda: None)
    assert file.path.read_text().count("\n") == len(file.items) == 4
    assert file.items["4"]["skipped"] == "no media"
    assert all(file.items[name]["correct"] is False for name in "123")
    with EvaluationRun(tmp_path / "refused", "tiny", "seed25", {}) as run:
        file = run.items("Z")
        ask(questions[:1], file, replace(config, max_tokens=10**6), "Z", lambda: None)
    assert "max_tokens" in file.items["1"]["failed"]
    with EvaluationRun(tmp_path / "gone", "tiny", "seed25", {}) as run:
        gone = replace(config, url="http://127.0.0.1:9/v1", backoff=0.0)
        with pytest.raises(BenchmarkError, match="no connection"):
            ask(questions[:1], run.items("Z"), gone, "Z", lambda: None)


def test_a_server_that_ends_while_it_is_asked_ends_the_run(server: Running, tmp_path: Path) -> None:
    image = base64.b64encode(jpeg(3)).decode()
    path = tsv(tmp_path / "z.tsv", *((str(n), image, "What?", "x") for n in range(3)))
    config = EndpointConfig(f"{server.http}/v1", MODEL, max_tokens=4, concurrency=1)

    with EvaluationRun(tmp_path / "out", "tiny", "seed25", {}) as run:
        file = run.items("Z")

        def check() -> None:
            if file.items:
                raise BenchmarkError("the server ended")

        with pytest.raises(BenchmarkError, match="the server ended"):
            ask(read_tsv(path), file, config, "Z", check)
        assert 0 < len(ItemFile(file.path).items) < 3  # what was answered is kept


def test_a_file_in_another_form_says_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("index\tquestion\n1\tWhat?\n")
    with pytest.raises(BenchmarkError, match=r"x\.tsv: has no column answer, image"):
        read_tsv(path)
    with pytest.raises(BenchmarkError, match=r"none\.tsv: cannot be read"):
        read_tsv(tmp_path / "none.tsv")


def test_lines_that_are_cut_off_or_broken_are_named(tmp_path: Path) -> None:
    head = "index\timage\tquestion\tanswer"
    path = tmp_path / "x.tsv"
    for lines, said in (
        ([head, "1\t\tWhat?\tA", "2\t\tWhat"], "question 2: the line has too few columns"),
        ([head], "x.tsv: has no questions"),
    ):
        path.write_text("\n".join(lines))
        with pytest.raises(BenchmarkError, match=said):
            read_tsv(path)
    broken, numbers = f"['{'A' * 80}', broken", f"[1, {'2' * 80}]"
    lines = [head, f"1\t{broken}\tWhat?\tA", f"2\t{numbers}\tWhat?\tA"]
    path.write_text("\ufeff" + "\n".join(lines))
    images = [question.images for question in read_tsv(path)]
    assert images == [(broken,), ("1", "2" * 80)]


def look(server: ExternalServer, seconds: float) -> None:
    """As a run does while it waits for answers."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        server.check()
        time.sleep(0.02)


def test_a_server_of_others_that_ends_ends_the_run(tiny: Path) -> None:
    engine = load_engine(tiny, device="cpu", window=4, max_tokens=256, max_sessions=1)
    with serving(engine, Limits()) as running:
        there = ExternalServer(f"{running.http}/v1/", gone=0.3, every=0.1)
        assert there.url == running.http
        look(there, 0.6)
    with pytest.raises(BenchmarkError, match=r"the server has not answered for 0\.3 s"):
        look(there, 300)
    with pytest.raises(BenchmarkError, match="no server answers there"):
        ExternalServer(running.http)


def test_a_server_whose_weights_change_ends_the_run(tiny: Path) -> None:
    """As one that is started anew with another export at the same address."""
    engine = load_engine(tiny, device="cpu", window=4, max_tokens=256, max_sessions=1)
    with serving(engine, Limits()) as running:
        there = ExternalServer(running.http, every=0.0)
        there.check()
        assert there.weights == MODEL  # a server that says nothing of its weights names its model
        there.weights = "1b9c0001"
        with pytest.raises(BenchmarkError, match=r"serves other weights \(moss-video\) .*1b9c0001"):
            there.check()
    assert weights_at(running.http) == ""
    check_weights(running.http, "1b9c0001")  # it does not answer: `check` says for how long


def test_the_order_of_a_servers_models_does_not_matter() -> None:
    """As of a gateway, whose `/health` says nothing."""
    names = [MODEL, "another"]

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            cards = [{"id": name, "root": f"/{name}"} for name in names]
            self.send_response(200)
            self.end_headers()
            models = self.path == "/v1/models"
            self.wfile.write(json.dumps({"data": cards}).encode() if models else b"")

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = ExternalServer(f"http://127.0.0.1:{server.server_port}", every=0.0)
        assert there.weights == f"{MODEL} /{MODEL}"
        names.reverse()
        there.check()
        server.shutdown()


def test_the_table_says_how_large_pictures_are(tiny: Path, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--dtype", "fp32"]
    with Server(Serving(tiny, 16, 1, flags=flags), tmp_path / "log.txt") as server:
        there = ExternalServer(server.url)
        assert server.resolution == there.resolution == f"{SIZE} x {SIZE}"
        assert there.weights == weights_of(tiny)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"config\.json: .*give the folder of an export"):
        Server(Serving(tmp_path, 16), tmp_path / "log.txt")
