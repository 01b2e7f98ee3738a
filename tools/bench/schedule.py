"""Simulates how fast many sessions would speak on a GPU, from the times that its steps take.

    python -m tools.bench.schedule --sessions 16 --seconds 60

The sessions are real (inference/session/session.py), the engine is a clock: a step takes as long as
its passes took on an H200 in steps written by hand (11B, bf16, 256 frames, 2,048 tokens of text;
docs/benchmarks.md). The host's work between two steps is `--host-ms`. So the table is predicted,
not measured: it shows what the order of the steps costs. With `--overlap` the tower runs beside the
passes that need no frame, and neither is slower for it: the most that a second stream could gain.
"""

from __future__ import annotations

import argparse
import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data_pipeline.commands import DONE, CommandParser, finite_number, whole_number
from data_pipeline.tables import format_table
from inference.bench.measure import percentile_ms
from inference.bench.served import plain_processor
from inference.session.inputs import Frame, Prompt, StepRequest
from inference.session.response import Vocabulary
from inference.session.session import Session, SessionConfig
from inference.session.stats import Stats

# Seconds of a pass of one token, by slots; of the tower, by frames.
DECODE = {1: 0.00605, 4: 0.00687, 16: 0.01012}
TOWER = {1: 0.008, 16: 0.110}
PROMPT_TOKEN = 25e-6  # seconds that a token of a prompt adds to a pass: 16 GFLOP at 650 TFLOP/s
PICTURE = torch.zeros(3, 1, 1, dtype=torch.uint8)


def between(table: dict[int, float], count: int) -> float:
    """A value of the table, interpolated between its neighbours; 0 for 0."""
    if not count:
        return 0.0
    sizes = sorted(table)
    if count <= sizes[0]:
        return table[sizes[0]]
    right = min(bisect_left(sizes, count), len(sizes) - 1)
    low, high = sizes[right - 1], sizes[right]
    return table[low] + (table[high] - table[low]) * (count - low) / (high - low)


def step_seconds(
    requests: Sequence[StepRequest], pending: Sequence[bool], overlap: bool = False
) -> float:
    """Seconds of an engine's step: the tower, then a pass for all tokens, one for all frames, and
    one for each prompt (inference/engine/graphs.py, `divide`).

    overlap: the tower takes no time while passes run that need no frame.
    """
    tower = between(TOWER, sum(len(r.images) for r in requests))
    waits, rest, slots = 0.0, 0.0, {1: 0, 2: 0}  # seconds of passes with and without frames
    for request, waiting in zip(requests, pending, strict=True):
        count = len(request.tokens) + waiting
        if count in slots:
            slots[count] += 1
        elif request.images:
            waits += DECODE[1] + PROMPT_TOKEN * count
        else:
            rest += DECODE[1] + PROMPT_TOKEN * count
    rest += between(DECODE, slots[1])
    waits += between(DECODE, slots[2])
    return waits + (max(tower, rest) if overlap else tower + rest)


@dataclass
class Traffic:
    """What arrives. Questions come at random, on average every `question_every` seconds (0:
    never), of 10 to 200 tokens."""

    sessions: int
    seconds: float
    fps: float = 1.0
    question_every: float = 20.0
    seed: int = 0

    def events(self) -> list[tuple[float, int, str]]:
        """Second, session, and the question; empty: a frame. The first frame comes first."""
        draw, events = random.Random(self.seed), list[tuple[float, int, str]]()
        for session in range(self.sessions):
            shift = session / (self.fps * self.sessions)  # viewers know nothing of each other
            frames = range(round(self.seconds * self.fps))
            events += [(shift + frame / self.fps, session, "") for frame in frames]
            second = shift
            while self.question_every:
                second += draw.expovariate(1 / self.question_every)
                if second >= self.seconds:
                    break
                events.append((second, session, " a" * draw.randint(10, 200)))
        return sorted(events)


@dataclass
class Result:
    """tokens: of each session. decisions, answers: seconds from the arrival of a frame to its
    decision, of a question to its first token."""

    seconds: float
    tokens: list[int]
    decisions: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)

    @property
    def slowest(self) -> float:
        """Tokens/s of the slowest session."""
        return min(self.tokens) / self.seconds


def simulate(traffic: Traffic, host_s: float = 0.0, overlap: bool = False) -> Result:
    """All sessions speak without end; each step takes in what has arrived when it begins."""
    vocabulary = Vocabulary.of(plain_processor(512).tokenizer.backend_tokenizer)
    word = vocabulary.tokenizer.encode("a", add_special_tokens=False).ids[0]
    config = SessionConfig(pace=None, max_new_tokens=None)
    sessions = [Session(f"s{n}", config, vocabulary, Stats()) for n in range(traffic.sessions)]
    pending = [False] * traffic.sessions
    result, now = Result(traffic.seconds, [0] * traffic.sessions), 0.0
    waiting = traffic.events()[::-1]
    asked_at: list[list[float]] = [[] for _ in sessions]
    while now < traffic.seconds:
        while waiting and waiting[-1][0] <= now:
            second, number, text = waiting.pop()
            if text:
                sessions[number].ask(Prompt(text, second))
                asked_at[number].append(second)
            else:
                sessions[number].push(Frame(PICTURE, second, second))
        steps = [(n, r) for n, s in enumerate(sessions) if (r := s.next_step(now)) is not None]
        if not steps:
            now = waiting[-1][0] if waiting else traffic.seconds
            continue
        requests, waits = [r for _, r in steps], [pending[n] for n, _ in steps]
        now += host_s + step_seconds(requests, waits, overlap)
        for number, request in steps:
            pending[number] = request.sample
            if not request.sample:
                continue
            sessions[number].on_token(request, word, now)
            result.tokens[number] += 1
            if request.frame:
                result.decisions.append(now - request.frame.arrived)
            if asked_at[number] and not sessions[number].prompts:
                result.answers += [now - second for second in asked_at[number]]
                asked_at[number].clear()
    return result


def main() -> int:
    """Prints the table."""
    arguments = parse()
    heads = ["sessions", "tokens/s of the slowest", "in all", "frame -> decision, p95",
             "question -> first token, p95"]  # fmt: skip
    rows = [heads]
    for sessions in arguments.sessions:
        traffic = Traffic(sessions, arguments.seconds)
        found = simulate(traffic, arguments.host_ms / 1000, arguments.overlap)
        times = (found.decisions, found.answers)
        rows.append([
            str(sessions), f"{found.slowest:.1f}", f"{sum(found.tokens) / found.seconds:.0f}",
            *(f"{percentile_ms(seconds, 95):.1f} ms" if seconds else "" for seconds in times),
        ])  # fmt: skip
    print(format_table(rows, "r"))
    return DONE


def parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = CommandParser("python -m tools.bench.schedule", description=__doc__)
    add = parser.add_argument
    add("--sessions", type=whole_number(above=0), nargs="+", default=[1, 4, 16], metavar="N",
        help="live ones, each with a frame a second")  # fmt: skip
    add("--seconds", type=whole_number(above=0), default=120, metavar="N", help="of the stream")
    add("--host-ms", type=finite_number(least=0), default=1.0, metavar="MS",
        help="of the host between two steps")  # fmt: skip
    add("--overlap", action="store_true",
        help="the tower runs beside passes that need no frame, at no cost")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
