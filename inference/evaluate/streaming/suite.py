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
from inference.evaluate.streaming import curve
from inference.evaluate.streaming.asking import (
    NO_MEDIA,
    OFFICIAL,
    PUSH,
    UNREADABLE,
    Asked,
    Asking,
    Job,
    Speakers,
    watched_of,
)
from inference.evaluate.streaming.chosen import Chosen, choose
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.events import Events, Heard
from inference.evaluate.streaming.items import Judge
from inference.evaluate.streaming.judge import EndpointJudge, no_judge
from inference.evaluate.streaming.scored import score, totals
from inference.evaluate.streaming.speaker import ModelSpeaker
from inference.evaluate.streaming.words import describe_own, read_words

NAME = "streaming"
_NAMED = 5  # missing videos that a message names; the files of items have all of them


def run(checkpoint: str, out: Path, config: StreamingConfig, **engine: Any) -> Results:
    """Evaluates an export, or the model of a server (`config.url`; then `checkpoint` is not
    opened). The results' exit code says whether all items were asked.

    Args:
        engine: arguments of `inference.load`: device, dtype, quantize, ...

    Raises:
        FormError, BenchmarkError, ExportError, ValueError: an argument cannot be used.
    """
    chosen = choose(config)
    if config.url:
        key = os.environ.get(config.url_key_env, "")
        with _judge(config, out) as judge:
            return evaluate(chosen, _remote(config, key), judge, config.url, out, config)
    with load(checkpoint, max_sessions=config.sessions, **engine) as model:
        if model.info.watches is False:
            raise BenchmarkError(f"{checkpoint}: has not learned to watch: give a real-time model")
        with _judge(config, out) as judge:
            return evaluate(chosen, _speakers(model, config), judge, checkpoint, out, config)


def _speakers(model: Model, config: StreamingConfig) -> Speakers:
    def speaker(bias: float | None) -> ModelSpeaker:
        speaking = config.speaking
        return ModelSpeaker(
            model, speaking if bias is None else replace(speaking, silence_bias=bias)
        )

    return speaker


def _remote(config: StreamingConfig, key: str) -> Speakers:
    # The extra `serve` has its client.
    from inference.evaluate.streaming.remote import RemoteSpeaker, check_server

    check_server(config.url)

    def speaker(bias: float | None) -> RemoteSpeaker:
        speaking = config.speaking
        speaking = speaking if bias is None else replace(speaking, silence_bias=bias)
        return RemoteSpeaker(config.url, speaking, key)

    return speaker


def evaluate(
    chosen: list[Chosen],
    speakers: Speakers,
    judge: Judge,
    model: str,
    out: Path,
    config: StreamingConfig,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Results:
    """Evaluates any speaker, as `run` does. `tell` is called with each message about a problem."""
    jobs = list(_jobs(chosen, config))
    with EvaluationRun(out, model, NAME, _settings(chosen, config)) as run:
        asked = Asked(out / "said")
        progress = Progress("items", len(jobs))
        asking = Asking(asked, speakers, config, progress.step)
        try:
            asking.run(jobs)
        finally:
            progress.end()
        if asking.stopped:
            tell(f"stopped: {asking.stopped}; run it again to go on")
        for words in _missing(jobs, asked):
            tell(words)
        plain = [job for job in jobs if job.bias is None]
        scores = score(plain, asked, judge, config.judge.concurrency)
        if scores.failure:
            tell(scores.failure)
        rows = scores.rows(run)
        return run.finish([*rows, *totals(rows), *_curve(jobs, asked, out)])


def _missing(jobs: list[Job], asked: Asked) -> Iterator[str]:
    """Messages that name the videos that are missing, or cannot be read."""
    for why in (NO_MEDIA, UNREADABLE):
        lacking = (job for job in jobs if (asked.record(job) or {}).get("skipped") == why)
        paths = list(dict.fromkeys(str(job.item.video) for job in lacking))
        if paths:
            more = f", and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
            yield f"{why}: {', '.join(paths[:_NAMED])}{more}"


def _jobs(chosen: list[Chosen], config: StreamingConfig) -> Iterator[Job]:
    """Each item in the configured protocols, and each item of events at each bias."""
    for one in chosen:
        benchmark, wanted = one.benchmark, config.protocol
        for item in one.items:
            if benchmark.polls(item) and wanted != PUSH:
                yield Job(benchmark, item, OFFICIAL)
            if not benchmark.polls(item) or wanted != OFFICIAL:
                yield Job(benchmark, item, PUSH)
        if isinstance(benchmark, Events):
            yield from (
                Job(benchmark, item, PUSH, bias) for bias in config.biases for item in one.items
            )


def _curve(jobs: list[Job], asked: Asked, out: Path) -> list[Row]:
    """Writes the curve over the biases; returns its rows of the table."""
    heard: dict[float, list[Heard]] = {}
    lost: dict[float, list[dict[str, Any]]] = {}
    for job in jobs:
        if job.bias is not None and isinstance(job.benchmark, Events):
            record = asked.record(job) or {}
            streams, unwatched = heard.setdefault(job.bias, []), lost.setdefault(job.bias, [])
            if "said" in record:
                streams.append(job.benchmark.hear(job.item, watched_of(record)))
            else:
                unwatched.append(record)
    points = [
        curve.operating(bias, streams)
        for bias, streams in heard.items()
        if any(stream.told for stream in streams)
    ]
    if points:
        curve.write_curve(points, out)
    return curve.rows(points, lost)


@contextmanager
def _judge(config: StreamingConfig, out: Path) -> Iterator[Judge]:
    if not config.judge.model:
        yield no_judge
        return
    own = Path(config.prompts) if config.prompts else None
    judge = EndpointJudge(config.judge, read_words(own=own), out / "judge")
    try:
        yield judge
    finally:
        judge.close()


def _settings(chosen: list[Chosen], config: StreamingConfig) -> dict[str, Any]:
    """The settings that a later run in the same folder must share."""
    settings = asdict(config)
    judge = settings.pop("judge")
    settings["judge"] = f"{judge['model']} at {judge['url']}" if judge["model"] else "none"
    for name in ("sessions", "url", "url_key_env"):  # these do not change answers
        del settings[name]
    settings |= settings.pop("speaking")
    if config.prompts:
        settings["prompts"] = describe_own(Path(config.prompts))
    settings["questions"] = {n: digest for one in chosen for n, digest in one.files.items()}
    settings["words"] = {n: p for one in chosen for n, p in one.words.found.items()} or "ours"
    return settings
