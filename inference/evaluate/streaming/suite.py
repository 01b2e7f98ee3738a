"""The suite `streaming`: benchmarks of streams, in their official protocols and in push mode.

OUT/said/BENCHMARK PROTOCOL.jsonl   what the model said: never asked again
OUT/replies.sqlite                  what the judge said
OUT/items, results.*                scores (inference.evaluate.results)
OUT/curve.json, curve.svg           the operating curve over events
"""

from __future__ import annotations

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
    OFFICIAL,
    PUSH,
    Asked,
    Asking,
    Job,
    Speakers,
    watched_of,
)
from inference.evaluate.streaming.chosen import Chosen, choose
from inference.evaluate.streaming.config import StreamingConfig
from inference.evaluate.streaming.events import Events
from inference.evaluate.streaming.items import Judge
from inference.evaluate.streaming.judge import EndpointJudge, no_judge
from inference.evaluate.streaming.scored import score, totals
from inference.evaluate.streaming.speaker import ModelSpeaker
from inference.evaluate.streaming.words import read_words

NAME = "streaming"


def run(checkpoint: str, out: Path, config: StreamingConfig, **engine: Any) -> Results:
    """Evaluates an export; the results' exit code says whether all was asked.

    Args:
        engine: arguments of `inference.load`: device, dtype, quantize, ...

    Raises:
        FormError, BenchmarkError, ExportError, ValueError: what was given cannot be used.
    """
    chosen = choose(config)
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


def evaluate(
    chosen: list[Chosen],
    speakers: Speakers,
    judge: Judge,
    model: str,
    out: Path,
    config: StreamingConfig,
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Results:
    """As `run`, of any speaker. tell: is given what went wrong."""
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
        plain = [job for job in jobs if job.bias is None]
        scores = score(plain, asked, judge, config.judge.concurrency)
        if scores.failure:
            tell(scores.failure)
        rows = scores.rows(run)
        return run.finish([*rows, *totals(rows), *_curve(jobs, asked, out)])


def _jobs(chosen: list[Chosen], config: StreamingConfig) -> Iterator[Job]:
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
    """Of the biases at which all events have been watched."""
    heard: dict[float, list[Any]] = {}
    for job in jobs:
        if job.bias is not None and isinstance(job.benchmark, Events):
            record = asked.record(job)
            if record is not None and "said" in record:
                told = job.benchmark.hear(job.item, watched_of(record))
                heard.setdefault(job.bias, []).append(told)
    points = [curve.operating(bias, told) for bias, told in heard.items()]
    if not points:
        return []
    curve.write_curve(points, out)
    return curve.rows(points)


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
    """What a later run must have in common with this one."""
    settings = asdict(config)
    judge = settings.pop("judge")
    settings["judge"] = f"{judge['model']} at {judge['url']}" if judge["model"] else "none"
    del settings["sessions"]  # changes no answer
    settings |= settings.pop("speaking")
    settings["words"] = {n: p for one in chosen for n, p in one.words.found.items()} or "ours"
    return settings
