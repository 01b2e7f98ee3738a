"""Traces by OTLP over HTTP: what arrives at a collector, of a front and its replica."""

from __future__ import annotations

import gzip
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from inference.engine.engine import Engine
from inference.engine.load import load_engine
from inference.serve import traces
from inference.serve.__main__ import main
from inference.serve.access import Access
from inference.serve.limits import Limits
from inference.serve.traces import Tracer
from tests.inference.replicas.fronting import FRONT_KEY, Fronted, fronting
from tests.inference.serve.serving import jpeg, serving
from tests.waiting import PATIENCE

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        assert self.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {one.key: one.value.string_value for one in resource.resource.attributes}
            assert service["service.name"] == "moss-serve"
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def done(tiny: Path, collector: Collector) -> dict[str, Any]:
    """A chat request and a session, and what their clients got."""
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=2)
    with mock.patch.object(traces, "_TIMEOUT", 120.0):  # what it gives up is not sent again
        ours = Access(tracer=Tracer(collector.url))
        replica = Access(front_key=FRONT_KEY, tracer=Tracer(collector.url))
    began = time.time_ns()
    with fronting([engine], ours, Limits(fps=60, decoders=1), [replica]) as front:
        found = play(front)
    ours.close()
    replica.close()
    return {**found, "began": began, "ended": time.time_ns()}


def play(front: Fronted) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "A"}], "max_tokens": 6, "ignore_eos": True}
    answer = httpx.post(
        f"{front.http}/v1/chat/completions", json=body, timeout=PATIENCE,
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    ).json()  # fmt: skip
    with front.open() as client:
        client.until("session.created")
        client.update(source="file", silence_bias=-50, max_output_tokens=5)
        client.ask("Who is it?")
        said = client.until("response.done")
        for second in range(3):
            client.frame(jpeg(second), ts=float(second))
        client.send("input_image_buffer.end")
        client.rest()
    return {"answer": answer, "said": said, "closed": client.seen[-1]}


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def below(spans: list[Any], parent: Any, *, elsewhere: bool = False) -> dict[str, Any]:
    """The spans below one, by their names; each lies within it. elsewhere: they are those of
    another server, which may end its own after its last word has arrived."""
    found = [span for span in spans if span.parent_span_id == parent.span_id]
    for span in found:
        assert span.trace_id == parent.trace_id
        assert parent.start_time_unix_nano - 10**7 <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        assert elsewhere or span.end_time_unix_nano <= parent.end_time_unix_nano + 10**7
    return {span.name: span for span in found}


def test_a_chat_request_is_one_trace_from_its_client_to_the_engine(
    collector: Collector, done: dict[str, Any]
) -> None:
    mine = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    (request,) = (span for span in mine if span.parent_span_id.hex() == PARENT)
    assert (request.name, attributes(request)["moss.key"]) == ("chat", "anonymous")
    at_replica = below(mine, request, elsewhere=True)["chat"]
    parts = below(mine, at_replica)
    assert set(parts) == {"decode", "queue", "answer"}
    inner = below(mine, parts["answer"])
    assert set(inner) == {"prefill", "steps"}
    order = [parts["decode"], parts["queue"], inner["prefill"], inner["steps"]]
    times = [t for span in order for t in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    assert times[-1] <= request.end_time_unix_nano + 10**7
    assert done["began"] <= times[0] <= times[-1] <= done["ended"]
    usage = done["answer"]["usage"]
    for span in (request, at_replica):
        told = attributes(span)
        assert told["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
        assert told["gen_ai.usage.output_tokens"] == usage["completion_tokens"]
        assert (told["moss.ended"], told["moss.id"]) == ("done", done["answer"]["id"])


def test_a_session_is_a_trace_with_its_frames_and_answers(
    collector: Collector, done: dict[str, Any]
) -> None:
    (session,) = (span for span in collector.spans if span.name == "realtime")
    mine = [span for span in collector.spans if span.trace_id == session.trace_id]
    parts = below(mine, session)
    assert set(parts) == {"queue", "frame", "answer"}
    assert sum(span.name == "frame" for span in mine) == 3
    asked = [a for a in mine if a.name == "answer" and "prefill" in below(mine, a)]
    said = done["said"]["usage"]["output_tokens"]
    assert attributes(asked[0])["gen_ai.usage.output_tokens"] == said == 5
    assert attributes(session)["moss.frames"] == done["closed"]["usage"]["frames"] == 3
    assert attributes(session)["moss.asked.source"] == "file"
    assert "Who is it?" not in str(mine)


def watch_and_ask(engine: Engine, access: Access) -> list[float]:
    """Serves a session and a chat request; the times of the session's events."""
    with serving(engine, Limits(fps=60, decoders=1), access=access) as server:
        with server.open() as client:
            client.update(source="file", silence_bias=-50, max_output_tokens=5)
            client.ask("Who is it?")
            client.until("response.done")
            client.frame(jpeg(), ts=0.0)
            client.send("input_image_buffer.end")
            times = [event["t_server"] for event in client.rest()]
        body = {"messages": [{"role": "user", "content": "A"}], "max_tokens": 6}
        assert server.post(json=body).status_code == 200
    return times


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_a_clock_that_is_set_while_the_server_runs_moves_no_span(
    step: float, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")  # spans are sent at the end
    set_by, clock, began = itertools.count(), time.time, time.monotonic()
    engine = load_engine(tiny, device="cpu", window=16, max_tokens=512, max_sessions=2)
    with Collector() as collector, mock.patch.object(traces, "_TIMEOUT", 120.0):
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        access = Access(tracer=Tracer(collector.url))
        with monkeypatch.context() as patched:
            # The clock is set each time it is read.
            patched.setattr(time, "time", lambda: clock() + step * next(set_by))
            times = watch_and_ask(engine, access)
        access.close()
        took = time.monotonic() - began
        collector.shutdown()
    assert times == sorted(times)
    assert times[-1] - times[0] <= took
    spans = collector.spans
    assert {"realtime", "frame", "chat", "decode", "queue", "answer", "prefill", "steps"} == {
        span.name for span in spans
    }
    for span in spans:
        assert span.end_time_unix_nano - span.start_time_unix_nano <= took * 1e9
        below(spans, span)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--otel", "http://127.0.0.1:4318"], "pip install 'moss-train[otel]'"),
        (["--otel", "127.0.0.1:4318"], "write http://HOST:PORT"),
        (["--keys", "none.yaml"], "--keys none.yaml: No such file"),
        (["--audit_log", "none/audit.jsonl"], "--audit_log none/audit.jsonl: No such file"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(
    flags: list[str],
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not there
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(tiny), "--device", "cpu", "--port", "0", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
