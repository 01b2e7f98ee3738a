"""Runs the suite `streaming`: benchmarks of streams, in official protocols and in push mode.

OUT/said/BENCHMARK PROTOCOL.jsonl   what the model said: never asked again
OUT/replies.sqlite                  what the judge said
OUT/items, results.*                scores (inference.evaluate.results)
OUT/curve.json, curve.svg           the operating curve over events
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_pipeline.progress import Progress
from inference.api import Model, load
from inference.evaluate.results import BenchmarkError, EvaluationRun, Results, Row
from inference.evaluate.streaming import operating_curve
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.events import Events, StreamOutcome
from inference.evaluate.streaming.items import Judge
from inference.evaluate.streaming.jobs import (
    NO_MEDIA,
    OFFICIAL,
    PUSH,
    UNREADABLE,
    Job,
    JobRecords,
    JobRunner,
    Speakers,
    watched_of,
)
from inference.evaluate.streaming.judge import EndpointJudge, no_judge
from inference.evaluate.streaming.scoring import score, totals
from inference.evaluate.streaming.selection import Selection, select
from inference.evaluate.streaming.speaker import ModelSpeaker
from inference.evaluate.streaming.templates import describe_own, read_templates

NAME = "streaming"
# Of what is asked, and how: a run does not go on with answers to other questions.
_VERSION = 2
_NAMED = 5  # missing videos that a message names; the files of items have all of them


def run(checkpoint: str, out: Path, config: StreamingConfig, **engine: Any) -> Results:
    """Evaluates an export, or the model of a server (`config.url`; then `checkpoint` is not
    opened). The results' exit code says whether all items were asked.

    Args:
        engine: arguments of `inference.load`: device, dtype, quantize, ...

    Raises:
        FormError, BenchmarkError, ExportError, ValueError: an argument cannot be used.
    """
    selections = select(config)
    if config.url:
        speakers, weights = _remote(config, os.environ.get(config.url_key_env, ""))
        with _judge(config, out) as judge:
            return evaluate(selections, speakers, judge, config.url, out, config, weights=weights)
    with load(checkpoint, max_sessions=config.sessions, **engine) as model:
        if model.info.watches is False:
            raise BenchmarkError(f"{checkpoint}: has not learned to watch: give a real-time model")
        with _judge(config, out) as judge:
            return evaluate(selections, _speakers(model, config), judge, checkpoint, out, config)


def _speakers(model: Model, config: StreamingConfig) -> Speakers:
    def speaker(bias: float | None) -> ModelSpeaker:
        speaking = config.speaking
        return ModelSpeaker(
            model, speaking if bias is None else replace(speaking, silence_bias=bias)
        )

    return speaker


def _remote(config: StreamingConfig, key: str) -> tuple[Speakers, str]:
    """Speakers of a server, and what it says of its weights."""
    # The extra `serve` has its client.
    from inference.evaluate.streaming.remote import RemoteSpeaker, check_server

    weights = check_server(config.url)

    def speaker(bias: float | None) -> RemoteSpeaker:
        speaking = config.speaking
        speaking = speaking if bias is None else replace(speaking, silence_bias=bias)
        return RemoteSpeaker(config.url, speaking, key, weights)

    return speaker, weights


def evaluate(
    selections: list[Selection],
    speakers: Speakers,
    judge: Judge,
    model: str,
    out: Path,
    config: StreamingConfig,
    warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    weights: str | None = None,
) -> Results:
    """Evaluates any speaker, as `run` does. `warn` is called with each message about a problem.
    weights: what a server says of its weights."""
    jobs = list(_jobs(selections, config))
    with EvaluationRun(out, model, NAME, _settings(selections, config), weights) as run:
        records = JobRecords(out / "said")
        progress = Progress("items", len(jobs))
        runner = JobRunner(records, speakers, config, progress.step)
        try:
            runner.run(jobs)
        finally:
            progress.end()
        if runner.stopped:
            warn(f"stopped: {runner.stopped}; run it again to go on")
        for message in _missing(jobs, records):
            warn(message)
        plain = [job for job in jobs if job.bias is None]
        scores = score(plain, records, judge, config.judge.concurrency)
        if scores.failure:
            warn(scores.failure)
        rows = scores.rows(run)
        known = [row for selection in selections for row in selection.rows]
        return run.finish([*rows, *totals(rows, known), *_curve(jobs, records, out)])


def _missing(jobs: list[Job], records: JobRecords) -> Iterator[str]:
    """Messages that name the videos that are missing, or cannot be read."""
    for why in (NO_MEDIA, UNREADABLE):
        lacking = (job for job in jobs if (records.record(job) or {}).get("skipped") == why)
        paths = list(dict.fromkeys(str(job.item.video) for job in lacking))
        if paths:
            more = f", and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
            yield f"{why}: {', '.join(paths[:_NAMED])}{more}"


def _jobs(selections: list[Selection], config: StreamingConfig) -> Iterator[Job]:
    """Each item in the configured protocols, and each item of events at each bias."""
    for selection in selections:
        benchmark, protocol = selection.benchmark, config.protocol
        for item in selection.items:
            if benchmark.polls(item) and protocol != PUSH:
                yield Job(benchmark, item, OFFICIAL)
            if not benchmark.polls(item) or protocol != OFFICIAL:
                yield Job(benchmark, item, PUSH)
        if isinstance(benchmark, Events):
            yield from (
                Job(benchmark, item, PUSH, bias)
                for bias in config.biases
                for item in selection.items
            )


def _curve(jobs: list[Job], records: JobRecords, out: Path) -> list[Row]:
    """Writes the curve over the biases; returns its rows of the table."""
    outcomes: dict[float, list[StreamOutcome]] = {}
    lost: dict[float, list[dict[str, Any]]] = {}
    for job in jobs:
        if job.bias is not None and isinstance(job.benchmark, Events):
            record = records.record(job) or {}
            streams, unwatched = outcomes.setdefault(job.bias, []), lost.setdefault(job.bias, [])
            if "said" in record:
                streams.append(job.benchmark.outcome(job.item, watched_of(record)))
            else:
                unwatched.append(record)
    points = [
        operating_curve.operating_point(bias, streams)
        for bias, streams in outcomes.items()
        if any(stream.events for stream in streams)
    ]
    if points:
        operating_curve.write_curve(points, out)
    return operating_curve.rows(points, lost)


@contextmanager
def _judge(config: StreamingConfig, out: Path) -> Iterator[Judge]:
    if not config.judge.model:
        yield no_judge
        return
    own = Path(config.prompts) if config.prompts else None
    judge = EndpointJudge(config.judge, read_templates(own=own), out / "judge")
    try:
        yield judge
    finally:
        judge.close()


def _settings(selections: list[Selection], config: StreamingConfig) -> dict[str, Any]:
    """The settings that a later run in the same folder must share."""
    settings = asdict(config)
    judge = settings.pop("judge")
    settings["judge"] = f"{judge['model']} at {judge['url']}" if judge["model"] else "none"
    for name in ("sessions", "url", "url_key_env"):  # these do not change answers
        del settings[name]
    settings |= settings.pop("speaking")
    settings["version"] = _VERSION
    if config.prompts:
        settings["prompts"] = describe_own(Path(config.prompts))
    settings["questions"] = {
        n: digest for selection in selections for n, digest in selection.files.items()
    }
    settings["words"] = {
        n: p for selection in selections for n, p in selection.templates.found.items()
    } or "ours"
    return settings
