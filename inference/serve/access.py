"""Decides who may send requests, by keys and their accounts, and records them: audit log,
metrics."""

from __future__ import annotations

import argparse
import hmac
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.serve.accounts import Account, Kind, Visit
from inference.serve.audit import AuditLog
from inference.serve.keys import Key, Quota, read_keys
from inference.serve.limits import Limits
from inference.serve.traces import Tracer

_KEY_PROTOCOL = "openai-insecure-api-key."  # how browsers send a key
_VISIT = "moss.visit"  # of a scope
_TOKENS = ("input", "output")
_USED = ("input_tokens", "output_tokens")


class Access(Collector):
    """Who may use one server, with what limits, and what they have used.

    Args:
        keys: those of a file.
        api_key: one more, without limits, which may do all.
        front_key: of the front whose replica this is: it counts its clients itself.
    """

    def __init__(
        self,
        keys: Sequence[Key] = (),
        api_key: str | None = None,
        front_key: str | None = None,
        audit: AuditLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.front_key, self._audit, self._tracer = front_key, audit, tracer
        self._front = Account("front", Quota(), _Traced(self), operator=True, front=True)
        own = [(key.key, Account(key.name, key, self, operator=key.operator)) for key in keys]
        if api_key is not None:
            own.append((api_key, Account("api_key", Quota(), self, operator=True)))
        self._everybody = None
        if not own and front_key is None:
            self._everybody = Account("anonymous", Quota(), self, operator=True)
        self.accounts = [account for _, account in own]
        self.accounts += [self._everybody] if self._everybody else []
        self._by_key = [(key.encode(), account) for key, account in own]
        if front_key is not None:
            self._by_key.append((front_key.encode(), self._front))
        self._registry = CollectorRegistry()
        self._registry.register(self)

    @classmethod
    def of_flags(
        cls, args: argparse.Namespace, limits: Limits, front_key: str | None = None
    ) -> Access:
        """ValueError where a file of the flags is wrong."""
        keys = read_keys(args.keys) if args.keys else []
        audit = None
        if args.audit_log:
            audit = AuditLog(args.audit_log, limits.audit_bytes, limits.audit_files)
        tracer = Tracer(args.otel) if args.otel else None
        return cls(keys, args.api_key, front_key, audit, tracer)

    def close(self) -> None:
        """Writes what is still queued."""
        if self._audit is not None:
            self._audit.close()
        if self._tracer is not None:
            self._tracer.close()

    def find(self, connection: HTTPConnection) -> Account | None:
        """The account of a request's key, else everybody's; None: there is neither."""
        presented = _presented_key(connection)
        found = [one for key, one in self._by_key if hmac.compare_digest(presented, key)]
        return found[0] if found else self._everybody

    def is_operator(self, connection: HTTPConnection) -> bool:
        """Whether a request may read what is recorded of all keys."""
        account = self.find(connection)
        return account is not None and account.operator

    # Records

    def entered(self, visit: Visit, headers: Mapping[str, str]) -> None:
        if self._tracer is not None:
            name = visit.account.name
            visit.trace = self._tracer.begin(visit.kind, name, visit.at, headers)

    def ended(self, visit: Visit, ended: str, code: int | str) -> None:
        self.end_trace(visit, ended, code)
        self._write(visit, ended, code)

    def end_trace(self, visit: Visit, ended: str, code: int | str) -> None:
        used = visit.settled
        if visit.trace is not None:
            attributes = {"moss.id": visit.id or None, "moss.ended": ended, "moss.code": str(code)}
            attributes |= {f"moss.asked.{name}": value for name, value in visit.requested.items()}
            attributes |= {f"gen_ai.usage.{name}": getattr(used, name) for name in _USED}
            visit.trace.end(visit.now, {**attributes, "moss.frames": used.frames})

    def _write(self, visit: Visit, ended: str, code: int | str) -> None:
        if self._audit is None:
            return
        used = visit.settled
        self._audit.write({
            "time": _when(visit.at),
            "key": visit.account.name,
            "kind": visit.kind,
            "id": visit.id or None,
            "asked": visit.requested,
            "ended": ended,
            "code": visit.code or code,
            "usage": {**vars(used), "seconds": round(visit.seconds, 3)},
        })  # fmt: skip

    def turned_away(self, name: str | None, kind: Kind, code: str) -> None:
        if self._audit is not None:
            now = _when(datetime.now(UTC).timestamp())
            entry = {"time": now, "key": name, "kind": kind, "ended": "refused", "code": code}
            self._audit.write(entry)

    # Metrics

    def page(self) -> bytes:
        """The counts in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        for account in self.accounts:
            account.settle()
        yield from self._usage()
        limits = GaugeMetricFamily(
            "moss_key_limit", "limits of a key; what has none is not there", labels=["key", "limit"]
        )
        for account in self.accounts:
            for name in Quota.model_fields:
                value = getattr(account.quota, name)
                if value is not None:
                    limits.add_metric([account.name, name], value)
        yield limits
        lines = self._audit.written if self._audit else 0
        lost = self._audit.lost if self._audit else 0
        yield CounterMetricFamily("moss_audit_lines", "lines of the audit log", value=lines)
        yield CounterMetricFamily("moss_audit_lost", "lines that were not written", value=lost)

    def _usage(self) -> Iterator[Metric]:
        now = GaugeMetricFamily("moss_key_open", "open sessions and requests", labels=["key"])
        frames = CounterMetricFamily("moss_key_frames", "frames the model saw", labels=["key"])
        tokens = CounterMetricFamily("moss_key_tokens", "of models", labels=["key", "direction"])
        seconds = CounterMetricFamily(
            "moss_key_seconds", "for which sessions and requests were open", labels=["key"]
        )
        ended = CounterMetricFamily(
            "moss_key_ended", "sessions and requests by how they ended",
            labels=["key", "kind", "ended"],
        )  # fmt: skip
        refused = CounterMetricFamily(
            "moss_key_refused", "what a limit of a key has refused", labels=["key", "limit"]
        )
        for account in self.accounts:
            name = account.name
            now.add_metric([name], len(account.open))
            frames.add_metric([name], account.used["frames"])
            for direction in _TOKENS:
                tokens.add_metric([name, direction], account.used[f"{direction}_tokens"])
            running = sum(visit.seconds for visit in account.open)
            seconds.add_metric([name], account.seconds + running)
            for (kind, how), count in account.ended.items():
                ended.add_metric([name, kind, how], count)
            for limit in Quota.model_fields:
                refused.add_metric([name, limit], account.refused[limit])
        yield from (now, frames, tokens, seconds, ended, refused)


class _Traced:
    """Records of requests that a front passes on. The front keeps these itself, but for the traces
    of what happens here."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def entered(self, visit: Visit, headers: Mapping[str, str]) -> None:
        self._access.entered(visit, headers)

    def ended(self, visit: Visit, ended: str, code: int | str) -> None:
        self._access.end_trace(visit, ended, code)

    def turned_away(self, name: str | None, kind: Kind, code: str) -> None:
        pass


class Visits:
    """Middleware around the routes: ends the visit of a request when its answer is sent, or its
    client has left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, whole = 499, False

        async def note(message: Message) -> None:
            nonlocal status, whole
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)

        try:
            await self._app(scope, receive, note)
        finally:
            visit: Visit | None = scope.get(_VISIT)
            if visit is not None:
                visit.end(status, whole=whole)


def begin(connection: HTTPConnection, visit: Visit) -> None:
    """Sets the visit of this request."""
    connection.scope[_VISIT] = visit


def _presented_key(connection: HTTPConnection) -> bytes:
    scheme, _, key = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip(" \t").encode("latin-1")  # as it came: bytes, some of them "\xa0"
    for offered in connection.headers.get("sec-websocket-protocol", "").split(","):
        if offered.strip().startswith(_KEY_PROTOCOL):
            return offered.strip().removeprefix(_KEY_PROTOCOL).encode("latin-1")
    return b""


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
