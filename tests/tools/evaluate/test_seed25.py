"""ZeroBench of a server that ends before it has answered."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.commands import FAILED
from inference.evaluate.results import Results, Row, read_results
from tools.evaluate.seed25 import _with_earlier, main

IMAGE = "AAAA" * 20


class Health(BaseHTTPRequestHandler):
    """Answers about a server's health, and ends with the first question."""

    def do_GET(self) -> None:
        said = json.dumps({"status": "ok", "tile": 56}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self) -> None:
        self.close_connection = True
        threading.Thread(target=self.server.shutdown).start()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_what_was_done_before_a_server_ended_is_in_the_table(tmp_path: Path) -> None:
    lines = [f"{n}\t{IMAGE}\tWhat?\tA" for n in range(3)]
    questions = tmp_path / "z.tsv"
    head = "index\timage\tquestion\tanswer"
    questions.write_text("\n".join([head, "none\t\tWhat?\tA", *lines]) + "\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def close() -> None:
            thread.join()
            server.socket.close()

        closing = threading.Thread(target=close)
        closing.start()
        code = main([
            "--suite", "seed25", "--url", f"http://127.0.0.1:{server.server_port}/v1/",
            "--out", str(tmp_path / "out"), "--tasks", "ZeroBench(Sub)",
            "--zerobench", str(questions), "--concurrency", "1",
        ])  # fmt: skip
        server.shutdown()  # where no question has come
        closing.join()
    assert code == FAILED
    (row,) = read_results(tmp_path / "out").rows
    assert (row.count, row.of, row.skipped, row.missing) == (0, 4, {"no media": 1}, 3)
    assert row.settings["resolution"] == "56 x 56"


def test_rows_of_another_limit_say_so(tmp_path: Path) -> None:
    old, new = Row("MMStar", "average", 50.0, 8, 8), Row("AI2D", "exact_match", 60.0, 3088, 3088)
    Results("m", "seed25", {"limit": 8}, [old]).write(tmp_path)
    rows = _with_earlier(tmp_path, [new], None)
    assert [(row.row, row.settings) for row in rows] == [("MMStar", {"limit": 8}), ("AI2D", {})]
    Results("m", "seed25", {"limit": None}, rows).write(tmp_path)
    third = Row("V*", "score", 1.0, 8, 8)
    rows = _with_earlier(tmp_path, [third], 8)
    assert [row.settings.get("limit") for row in rows] == [None, "none", None]
    assert _with_earlier(tmp_path, [old, new], None) == [old, new]
