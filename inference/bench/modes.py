"""Runs the modes of `python -m inference.bench`, and makes the rows of their tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from statistics import mean
from typing import Any

import torch

from inference.bench import measure
from inference.bench.floor import Floor, Machine, Work, encoding_flop
from inference.bench.published import PublishedModel
from inference.bench.report import Row
from inference.bench.served import plain_processor, served
from inference.engine.engine import Engine
from inference.engine.engine_config import EngineConfig
from inference.engine.load import load_processor
from inference.engine.quantize import quantize_decoder
from inference.engine.tower_fp8 import round_tower
from inference.hf.modeling_moss_video import MossVideoForConditionalGeneration

SESSIONS = 16  # default number of live sessions
Result = tuple[list[Row], dict[str, object]]
Run = Callable[[Engine, torch.Tensor, int, measure.Clock], measure.Timings]


class Bench:
    """Measures a model.

    Args:
        model: not quantized, on its device.
        options: of the command line.
        clock: what times are measured with.
    """

    def __init__(
        self,
        model: MossVideoForConditionalGeneration,
        options: argparse.Namespace,
        clock: measure.Clock,
    ) -> None:
        self.model, self.options, self.clock = model, options, clock
        weight = next(model.parameters())
        self.machine = (
            Machine.measured(weight.device, weight.dtype, clock) if options.table else None
        )
        self._quantized = False  # the model is changed once, by the first engine

    def run(self) -> Result:
        """Runs the mode: the rows of its table, and further facts for the report."""
        return {"offline": self.offline, "stream": self.stream, "serve": self.serve}[
            self.options.mode
        ]()

    def offline(self) -> Result:
        """Measures a question about a whole video."""
        frames = self.options.frames
        ours, theirs, floor, common = self._compare(frames, measure.offline)
        rows = [
            _row("vision, all frames", "s", "vision", ours, theirs),
            _row("time to first token", "s", "first_token", ours, theirs),
            _row("published total", "s", "published_total", ours, theirs),
        ]
        if floor:
            least = floor.vision(frames), floor.first_token(frames, len(measure.QUESTION))
            rows[:2] = [replace(row, floor=f) for row, f in zip(rows[:2], least, strict=True)]
        return [*rows, *common], self._facts()

    def stream(self) -> Result:
        """Measures frames one by one, then questions. The published way computes the whole prompt
        again for a question."""
        if self.options.endless:
            return self._endless()
        window = self.options.window or self.options.frames
        ours, theirs, floor, common = self._compare(window, measure.stream)
        whole = None if theirs is None else 1e3 * theirs.first_token
        decision = question = joined = None
        if floor:
            tokens = 1 + len(measure.QUESTION)  # the pending token and the question
            decision, question = 1e3 * floor.decision(), 1e3 * floor.step(tokens=tokens)
            joined = 1e3 * (floor.vision() + floor.step(tokens=tokens + 1))
        median, percentile = measure.median_ms, measure.percentile_ms
        rows = [
            Row("question -> first token", "ms", median(ours.question), whole, floor=question),
            Row("question with a frame -> first token", "ms", median(ours.joined), None,
                floor=joined),
            Row("frame -> decision", "ms", median(ours.frames), None, floor=decision),
            Row("frame -> decision, p99", "ms", percentile(ours.frames, 99), None, floor=decision),
        ]  # fmt: skip
        if floor:
            longer = 1e3 * floor.step(tokens=1 + len(measure.LONGER))
            rows += _late(ours, decision, joined, longer)
        if self.options.sessions:
            rows.append(self._together(window, self.options.sessions))
        return [*rows, *common], self._facts()

    def serve(self) -> Result:
        """Measures many live sessions, all of which speak."""
        options, count = self.options, self.options.sessions or SESSIONS
        engine, moved = self._engine(options.window or options.frames, count, self._processor())
        found = served(
            engine, sessions=count, seen=options.frames, seconds=options.seconds, fps=options.fps
        )
        each = decision = None
        if floor := self._floor(engine, options.frames):
            # The share of a second that the frames of all sessions leave for tokens, in steps.
            frames = floor.vision(count) + floor.step(count, tokens=2)
            each = max(0.0, 1 - options.fps * frames) / floor.step(count)
            decision = 1e3 * floor.decision()
        p95 = measure.percentile_ms(found.decisions, 95)
        rows = [
            Row(f"each of {count} sessions", "tokens/s", found.rate, None, True, each),
            Row("the slowest of them", "tokens/s", min(found.rates), None, True, each),
            Row("frame -> decision, p95", "ms", p95, None, floor=decision),
            Row("frames dropped", "", found.dropped, None),
        ]
        facts = {"sessions": count, "seconds": options.seconds, "fps": options.fps}
        facts["decisions"] = len(found.decisions)
        return [*rows, *moved], {**self._facts(), **facts}

    def _endless(self) -> Result:
        """Measures whether memory and latency stay flat over a long stream."""
        engine, _ = self._engine(self.options.window or EngineConfig.window)
        result = measure.endless(engine, self.options.endless, self.clock)
        rows = [
            Row(f"memory after {result.frames // 10} frames", "MB", result.megabytes[0], None),
            Row(f"memory after {result.frames} frames", "MB", result.megabytes[-1], None),
            Row("frame -> decision, first tenth", "ms", result.milliseconds[0], None),
            Row("frame -> decision, last tenth", "ms", result.milliseconds[-1], None),
            Row("rate", "frames/s", result.rate, None, True),
        ]
        return rows, {"endless": vars(result)}

    def _compare(
        self, window: int, run: Run
    ) -> tuple[measure.Timings, measure.Timings | None, Floor | None, list[Row]]:
        """The engine's timings, the published way's, the floor, and the rows of every mode."""
        options = self.options
        pixels = measure.random_frames(self.model, options.frames)
        theirs = self._baseline(pixels)
        engine, moved = self._engine(window)
        run(engine, pixels[:2], 4, self.clock)  # warms up
        ours = run(engine, pixels, options.new_tokens, self.clock)
        floor = self._floor(engine, options.frames)
        decode = _row("decode", "tokens/s", "tokens_per_second", ours, theirs, True)
        decode = replace(decode, floor=1 / floor.step() if floor else None)
        return ours, theirs, floor, [decode, memory_row(engine, theirs is not None), *moved]

    def _together(self, window: int, sessions: int) -> Row:
        """Measures the decoding of all sessions at once."""
        engine, _ = self._engine(window, sessions)
        pixels = measure.random_frames(self.model, self.options.frames)
        measure.together(engine, pixels[:2], 4, self.clock)
        seconds = measure.together(engine, pixels, self.options.new_tokens, self.clock)
        floor = self._floor(engine, self.options.frames)
        rate, name = sessions * len(seconds) / sum(seconds), f"decode, {sessions} sessions in all"
        least = sessions / floor.step(sessions) if floor else None
        return Row(name, "tokens/s", rate, None, True, least)

    def _baseline(self, pixels: torch.Tensor) -> measure.Timings | None:
        """Timings of the same model run the published way; None: they are not asked for."""
        if self.options.baseline is None:
            return None
        print("running the published way ...", flush=True)
        published = PublishedModel(self.model)
        measure.published(published, pixels[:2], 3, self.clock)
        return measure.published(published, pixels, self.options.new_tokens, self.clock)

    def _engine(
        self, window: int, sessions: int = 1, processor: Any = None
    ) -> tuple[Engine, list[Row]]:
        """An engine in the dtypes of the options, and rows with how far these move the logits.

        The first call quantizes the model itself, so the baseline must have run before.
        """
        rows, kind = [], self.options.kv_dtype
        if self.options.quantize and not self._quantized:
            change = partial(quantize_decoder, kind=self.options.quantize)
            moved = measure.moved_by(self.model, change)
            rows.append(Row("logits moved (relative norm)", "", moved, None))
        if self.options.vision_dtype != "auto" and not self._quantized:
            moved = measure.moved_by(self.model, round_tower)
            rows.append(Row("logits moved by the vision tower", "", moved, None))
        if kind != "auto" and not self._quantized:
            moved = measure.moved_by_kept(self.model, kind)
            rows.append(Row("logits moved by keys and values", "", moved, None))
        self._quantized = True
        config = EngineConfig(
            kv_dtype=kind,
            vision_dtype=self.options.vision_dtype,
            window=window,
            max_tokens=2 * self.options.frames + 1024,
            max_sessions=sessions,
            compile=self.options.compile,
        )
        return Engine(self.model, processor, config), rows

    def _processor(self) -> Any:
        if self.options.checkpoint:
            return load_processor(self.options.checkpoint)
        return plain_processor(self.model.config.text_config.vocab_size)

    def _floor(self, engine: Engine, frames: int) -> Floor | None:
        """The least times on this machine for sessions that have seen so many frames, a token with
        each, and a question."""
        if self.machine is None:
            return None
        ring_frames = min(frames, engine.window)
        text = len(measure.PROMPT) + len(measure.QUESTION) + 2 * frames
        return Floor(self.machine, Work.of(self.model, engine, self._encoding), text, ring_frames)

    @cached_property
    def _encoding(self) -> int:
        return encoding_flop(self.model)

    def _facts(self) -> dict[str, object]:
        return {} if self.machine is None else {"machine": vars(self.machine)}


def _late(
    ours: measure.Timings, decision: float | None, joined: float | None, longer: float
) -> list[Row]:
    """Further rows of a stream's table: means, 95th percentiles and uploads. `decision`, `joined`
    and `longer` are floors in milliseconds."""
    p95 = partial(measure.percentile_ms, percent=95)
    return [
        Row("frame -> decision, mean", "ms", 1e3 * mean(ours.frames), None, floor=decision),
        Row("frame -> decision, p95", "ms", p95(ours.frames), None, floor=decision),
        Row("question of 30 -> first token, p95", "ms", p95(ours.longer), None, floor=longer),
        Row("question with a frame, p95", "ms", p95(ours.joined), None, floor=joined),
        Row("16 pictures to the device", "ms", measure.median_ms(ours.uploads), None),
    ]


def _row(
    name: str,
    unit: str,
    field: str,
    ours: measure.Timings,
    theirs: measure.Timings | None,
    more_is_better: bool = False,
) -> Row:
    other = None if theirs is None else getattr(theirs, field)
    return Row(name, unit, getattr(ours, field), other, more_is_better)


def memory_row(engine: Engine, compared: bool) -> Row:
    """The memory of a frame's keys and values, which the published way repeats to all heads."""
    frame = engine.cache.frames[..., : engine.cache.patches, :]  # [layers, 2, slots, ...]
    megabytes = frame.numel() * frame.element_size() / engine.max_sessions / 1e6
    text = engine.config.text_config
    repeated = megabytes * text.num_attention_heads / text.num_key_value_heads
    return Row("keys and values of a frame", "MB", megabytes, repeated if compared else None)
