"""A judge behind a real server on 127.0.0.1: asked once for each pair, never taken for a no."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.commands import DONE, FAILED
from data_pipeline.synthesis.config import EndpointConfig
from inference.evaluate.results import Results
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.judge import EndpointJudge, JudgeFailed
from inference.evaluate.streaming.selection import select
from inference.evaluate.streaming.suite import evaluate
from inference.evaluate.streaming.templates import read_templates
from tests.inference.evaluate.streaming import policies
from tests.inference.evaluate.streaming.published import write_omnimmi, write_proactivevideoqa


class Server(ThreadingHTTPServer):
    """Says yes where the last two lines with texts are alike, as 5 or 3, else no, as 1."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.status = 200

    @property
    def config(self) -> EndpointConfig:
        url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        return EndpointConfig(url, "judge", retries=1, backoff=0.0, temperature=0.0)


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the console."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        lines = dict(
            line.split(": ", 1)
            for line in body["messages"][1]["content"].splitlines()
            if line.startswith(("Correct answer: ", "Answer: "))
        )
        right = lines["Correct answer"] in lines.get("Answer", "")
        coverage = "pred" not in json.dumps(body["response_format"])
        reply: dict[str, Any] = {"score": 3 if right else 1}
        if not coverage:
            reply = {"pred": "yes" if right else "no", "score": 5 if right else 1}
        message = {"content": f"```json\n{json.dumps(reply)}\n```"}
        answer = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@contextmanager
def judging(server: Server, folder: Path) -> Iterator[EndpointJudge]:
    judge = EndpointJudge(server.config, read_templates(), folder)
    try:
        yield judge
    finally:
        judge.close()


def run(server: Server, named: str, out: Path) -> Results:
    config = StreamingConfig(benchmarks=(named,), protocol="push", judge=server.config)
    policy = policies.late()
    with judging(server, out / "judge") as judge:
        return evaluate(select(config), lambda bias: policy, judge, "policy", out, config)


def test_scores_are_those_of_the_servers_verdicts(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = run(server, f"omnimmi={write_omnimmi(tmp_path / 'omnimmi')}", out)
    values = {row.row: row.value for row in results.rows}
    assert values["omnimmi AP (push)"] == values["omnimmi MD (push)"] == 1
    assert values["omnimmi SI (score) (push)"] == 5
    # AP, SI, and two turns, which are the same in SG and MD.
    assert len(server.bodies) == 4
    assert server.bodies[0]["model"] == "judge"
    assert server.bodies[0]["temperature"] == 0
    again = run(server, f"omnimmi={tmp_path / 'omnimmi'}", out)
    assert again.rows == results.rows
    assert len(server.bodies) == 4


def test_coverage_is_judged_of_all_that_was_said(server: Server, tmp_path: Path) -> None:
    named = f"proactivevideoqa={write_proactivevideoqa(tmp_path / 'p')}"
    values = {row.row: row.value for row in run(server, named, tmp_path / "out").rows}
    assert values["proactivevideoqa EGO"] == pytest.approx(5.75 / 8)


def test_a_judge_that_fails_is_not_a_wrong_answer(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, out = f"omnimmi={write_omnimmi(tmp_path / 'omnimmi')}", tmp_path / "out"
    server.status = 401
    results = run(server, named, out)
    rows = {row.row: row for row in results.rows}
    row = rows["omnimmi SI (push)"]
    assert (row.value, row.count, row.of, row.failed) == (None, 0, 1, 1)
    assert rows["omnimmi PA"].value == 1
    assert results.exit_code == FAILED
    assert "the judge: " in capsys.readouterr().err
    server.status = 200
    assert run(server, named, out).exit_code == DONE


def test_a_reply_in_another_form_is_an_error(server: Server, tmp_path: Path) -> None:
    with judging(server, tmp_path) as judge:
        assert judge("match", "q", "stir", "stir it").score == 5
        assert not judge("match", "q", "stir", "cut").right
        assert judge("coverage", "q", "stir", "cut").score == 0
        server.status = 503
        with pytest.raises(JudgeFailed, match="2 tries: HTTP 503"):
            judge("match", "q", "stir", "fry")
