"""Traces of sessions and chat requests, for OpenTelemetry (`--otel URL`, OTLP over HTTP).

    chat       decode, queue, and for each answer: answer -> prefill, steps
    realtime   queue, frame (one for each), and for each question or response: answer -> queue,
               prefill, steps

Spans are made of what the event log says, with its times: nothing in the engine waits for them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from inference.session.events import Event, EventLog

SERVICE = "moss-serve"
_TIMEOUT = 5.0  # seconds for an export


class Tracer:
    """Sends spans.

    Args:
        url: of the endpoint, http://HOST:4318. $OTEL_EXPORTER_OTLP_HEADERS, $OTEL_TRACES_SAMPLER,
            $OTEL_SERVICE_NAME and others are read by the packages.

    Raises:
        ValueError: a package is missing.
    """

    def __init__(self, url: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ValueError(
                f"--otel: {error.name} is missing: pip install 'moss-train[otel]'"
            ) from None
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": SERVICE}
        self._provider = TracerProvider(resource=Resource.create(named))
        exporter = OTLPSpanExporter(f"{url}/v1/traces", timeout=_TIMEOUT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("inference.serve")

    def begin(self, kind: str, key: str, began: float, headers: Mapping[str, str]) -> Trace:
        """Begins the trace of a session or request, below that of its client where `traceparent`
        names one."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(headers))
        return Trace(self.tracer, kind, {"moss.key": key}, began, parent)

    def close(self) -> None:
        """Sends spans that are queued."""
        self._provider.shutdown()


class Trace:
    """A span and those below it. Times are seconds since the epoch."""

    def __init__(
        self, tracer: Any, name: str, attributes: Mapping[str, Any], began: float, parent: Any
    ) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        present = {name: value for name, value in attributes.items() if value is not None}
        self._span = tracer.start_span(name, parent, start_time=_ns(began), attributes=present)
        self._context = set_span_in_context(self._span)
        self._followers: set[asyncio.Task[None]] = set()

    @property
    def headers(self) -> dict[str, str]:
        """Headers that make a request a part of this trace."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, self._context)
        return carrier

    def add(self, name: str, began: float, ended: float, **attributes: Any) -> Trace:
        """Adds a span below it, which is over."""
        part = Trace(self._tracer, name, attributes, began, self._context)
        part.end(ended)
        return part

    def end(self, at: float, attributes: Mapping[str, Any] | None = None) -> None:
        present = {name: value for name, value in (attributes or {}).items() if value is not None}
        self._span.set_attributes(present)
        self._span.end(_ns(at))

    def follow(self, log: EventLog, began: float, ahead: float) -> None:
        """Adds spans of a session's or an answer's events, to its end. began: since when it waits:
        a session for its place, an answer for its first token. ahead: seconds by which the clock of
        this trace is ahead of the log's."""
        task = asyncio.create_task(self._follow(log, _Reader(self, began, ahead)))
        self._followers.add(task)
        task.add_done_callback(self._followers.discard)

    async def _follow(self, log: EventLog, reader: _Reader) -> None:
        async for event in log.afollow():
            reader.take(event)


class _Reader:
    """Makes spans of events."""

    def __init__(self, trace: Trace, began: float, ahead: float) -> None:
        self._trace, self._began, self._ahead = trace, began, ahead
        self._question_at: float | None = began  # an answer's question is there from the beginning
        self._prefill_at = began
        self._created = 0.0

    def take(self, event: Event) -> None:
        at, data = event.t_server + self._ahead, event.data
        if event.type == "session.created":
            self._trace.add("queue", self._began, at)
            self._question_at = None
        elif event.type == "input_frame.processed":
            began = at - (data["lag_ms"] + data["decision_ms"]) / 1000
            fields = {f"moss.{name}": data[name] for name in ("decision", "lag_ms", "decision_ms")}
            self._trace.add("frame", began, at, **fields)
        elif event.type == "conversation.item.created":
            self._question_at, self._prefill_at = at - data["wait_ms"] / 1000, at
        elif event.type == "response.created":
            self._created = at
        elif event.type == "response.done":
            self._answer(at, data["usage"]["output_tokens"], data["reason"])
        elif event.type == "session.state" and data["state"] == "silent" and self._question_at:
            self._created = at
            self._answer(at, 0, "silence")

    def _answer(self, at: float, tokens: int, reason: str) -> None:
        question_at, self._question_at = self._question_at, None
        began = self._created if question_at is None else question_at
        attributes = {"gen_ai.usage.output_tokens": tokens, "moss.reason": reason}
        answer = self._trace.add("answer", began, at, **attributes)
        if question_at is not None:
            if self._prefill_at > question_at:
                answer.add("queue", question_at, self._prefill_at)
            answer.add("prefill", self._prefill_at, self._created)
        answer.add("steps", self._created, at)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
