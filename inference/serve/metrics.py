"""Counts and durations of all sessions, for Prometheus: the route /metrics."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.serve.memory import Ceiling, SessionMemory
from inference.session.runner import Runner
from inference.session.stats import COUNTS, DECISIONS, DURATIONS, quantile

_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds
_RECENT = 10.0  # seconds over which tokens/s is taken
_WORDS = {
    "ttft": "from a prompt to the first token after it",
    "inter_token": "between two tokens of a response",
    "frame_decision": "from taking a frame in to its decision",
    "frame_lag": "from the arrival of a frame to taking it in",
    "interruption": "from the arrival of a prompt until it is in the context",
}


class Metrics:
    """Counts and durations of all sessions; a Runner calls `measured`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._tokens: deque[float] = deque(maxlen=65536)  # when each was said
        self._gaps: deque[float] = deque(maxlen=4096)
        self._decisions = dict.fromkeys(DECISIONS, 0)
        self._durations = {
            name: Histogram(
                f"moss_{name}_seconds", _WORDS[name], registry=self._registry, buckets=_STEPS
            )
            for name in DURATIONS
        }
        self._counts = {
            name: Counter(f"moss_{name}", f"{name} of all sessions", registry=self._registry)
            for name in COUNTS
        }
        self._drops = Counter(
            "moss_dropped_frames",
            "frames that were not taken in",
            ["reason"],
            registry=self._registry,
        )
        self._decided = Counter(
            "moss_decisions", "decisions on frames", ["decision"], registry=self._registry
        )
        for decision in self._decisions:
            self._decided.labels(decision)
        self._refused = Counter(
            "moss_refused", "sessions and requests refused", ["reason"], registry=self._registry
        )
        self._gauges = {
            name: Gauge(f"moss_{name}", words, registry=self._registry)
            for name, words in (
                ("sessions", "open sessions and requests"),
                ("cached_frames", "frames in the rings of all sessions"),
                ("tokens_per_second", f"of all sessions, over {_RECENT:.0f} s"),
                ("silence_ratio", "share of silent decisions"),
                ("sessions_held_bytes", "that open sessions and answers may take"),
                ("sessions_ceiling_bytes", "that they may take together; 0: no ceiling"),
            )
        }
        self._session_bytes = Gauge(
            "moss_session_bytes", "that a session may take", ["part"], registry=self._registry
        )
        self._quantiles = Gauge(
            "moss_inter_token_quantile_seconds",
            "of the last 4096 tokens",
            ["quantile"],
            registry=self._registry,
        )

    def measured(self, name: str, value: float) -> None:
        """Takes one more count or duration of a session."""
        with self._lock:
            if name == "inter_token":
                self._gaps.append(value)
            elif name == "tokens":
                self._tokens.append(time.monotonic())
            elif name in self._decisions:
                self._decisions[name] += int(value)
        if name in self._durations:
            self._durations[name].observe(value)
        elif name in self._counts:
            self._counts[name].inc(value)
        elif name in self._decisions:
            self._decided.labels(name).inc(value)
        elif name.startswith("drop:"):
            self._drops.labels(name.removeprefix("drop:")).inc(value)

    def refused(self, reason: str) -> None:
        """A session or a request was turned away."""
        self._refused.labels(reason).inc()

    def page(self, runner: Runner, each: SessionMemory, ceiling: Ceiling) -> bytes:
        """All metrics in Prometheus' text format."""
        with self._lock:
            since = time.monotonic() - _RECENT
            recent = sum(1 for at in self._tokens if at >= since)
            decisions = sum(self._decisions.values())
            silent = self._decisions["silence"] / decisions if decisions else 0.0
            gaps = deque(self._gaps)
        self._gauges["sessions"].set(runner.sessions)
        self._gauges["cached_frames"].set(runner.cached_frames)
        self._gauges["tokens_per_second"].set(recent / _RECENT)
        self._gauges["silence_ratio"].set(silent)
        self._gauges["sessions_held_bytes"].set(ceiling.held)
        self._gauges["sessions_ceiling_bytes"].set(ceiling.most)
        for part, size in asdict(each).items():
            self._session_bytes.labels(part).set(size)
        for percent in (50, 99) if gaps else ():
            self._quantiles.labels(str(percent / 100)).set(quantile(gaps, percent))
        return generate_latest(self._registry)
