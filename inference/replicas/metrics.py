"""/metrics of the front: the sum over its replicas, and what the front counts itself.

Counters and histograms of a replica that has ended stay in the sum.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import httpx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from inference.replicas.replica import Replica

_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
WAIT = 2.0  # seconds for a replica's page
# Metrics of which the largest of all replicas is shown: a sum would mean nothing.
_WORST = ("moss_inter_token_quantile_seconds", "moss_session_bytes")
_LEFT_OUT = ("moss_silence_ratio",)  # follows from moss_decisions_total
_OWN = ("moss_key_", "moss_audit_")  # of the front itself, which has the clients

Key = tuple[str, tuple[tuple[str, str], ...]]
Values = dict[Key, float]


class FrontMetrics:
    """What the front counts, and the last numbers of each replica."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._pages: dict[int, Values] = {}  # the last one, of the process that runs
        self._ended: Values = {}  # of processes that have ended
        self._families: dict[str, Metric] = {}
        self._gauges = {
            name: Gauge(f"moss_front_{name}", words, registry=self._registry)
            for name, words in (
                ("sessions", "sessions, with a replica or without"),
                ("waiting", "sessions that wait for a seat"),
                ("kept_bytes", "pictures and messages that are kept to go on elsewhere"),
                ("held_bytes", "what that may become, of all sessions"),
                ("ceiling_bytes", "what it may become at most"),
            )
        }
        self._states = Gauge(
            "moss_front_replica_ready", "1: it serves", ["replica"], registry=self._registry
        )
        self._counts = {
            name: Counter(f"moss_front_{name}", words, ["reason"], registry=self._registry)
            for name, words in (
                ("refused", "sessions and requests that were turned away here"),
                ("resumed", "sessions that went on on another replica"),
            )
        }
        self._starts = Counter(
            "moss_front_replica_ends", "replicas that have ended", registry=self._registry
        )
        self._rebuilds = Histogram(
            "moss_front_away_seconds", "from losing a replica to going on",
            registry=self._registry, buckets=_SECONDS,
        )  # fmt: skip
        self._registry.register(self)

    def refused(self, reason: str) -> None:
        self._counts["refused"].labels(reason).inc()

    def resumed(self, reason: str, seconds: float) -> None:
        self._counts["resumed"].labels(reason).inc()
        self._rebuilds.observe(seconds)

    def ended(self, replica: Replica) -> None:
        """Keeps the counts of a replica whose process has ended."""
        self._starts.inc()
        for key, value in self._pages.pop(replica.number, {}).items():
            if not _is_gauge(key[0]):
                self._ended[key] = self._ended.get(key, 0.0) + value

    async def page(self, replicas: Sequence[Replica], **gauges: int) -> bytes:
        """All metrics in Prometheus' text format. gauges: current values of the front's own."""
        await asyncio.gather(*(self._read(replica) for replica in replicas))
        for name, value in gauges.items():
            self._gauges[name].set(value)
        for replica in replicas:
            self._states.labels(str(replica.number)).set(replica.state == "ready")
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The sums, as prometheus_client asks for them."""
        values = self._sum()
        for family in self._families.values():
            names = {sample.name for sample in family.samples}
            metric = Metric(family.name, family.documentation, family.type)
            for (name, labels), value in values.items():
                if name in names:
                    metric.add_sample(name, dict(labels), value)
            yield metric

    async def _read(self, replica: Replica) -> None:
        if not replica.serves:
            return
        try:
            answer = await replica.http.get("/metrics", headers=replica.authorization, timeout=WAIT)
            answer.raise_for_status()
        except httpx.HTTPError:
            return
        values: Values = {}
        for family in text_string_to_metric_families(answer.text):
            if family.name in _LEFT_OUT or family.name.startswith(_OWN):
                continue
            self._families[family.name] = family
            for sample in family.samples:
                values[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        self._pages[replica.number] = values

    def _sum(self) -> Values:
        total = dict(self._ended)
        for page in self._pages.values():
            for key, value in page.items():
                if key[0] in _WORST:
                    total[key] = max(total.get(key, 0.0), value)
                elif not key[0].endswith("_created"):
                    total[key] = total.get(key, 0.0) + value
        return total


def _is_gauge(sample: str) -> bool:
    return not sample.endswith(("_total", "_bucket", "_count", "_sum"))
