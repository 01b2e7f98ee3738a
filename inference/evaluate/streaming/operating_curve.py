"""Computes the operating curve over the bias of `<|silence|>`: events told against false alarms."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.atomic import write_atomically
from inference.evaluate.results import Item, Row, mean_row
from inference.evaluate.streaming.events import StreamOutcome


@dataclass(frozen=True)
class OperatingPoint:
    """A point of the curve."""

    bias: float
    events: int
    recall: float  # share of events told in time
    precision: float  # share of responses that tell an event or answer a question
    f1: float
    false_alarms: float  # a minute
    words: float  # a minute
    delay: float | None  # mean seconds to the first right word; None: no event was told


def operating_point(bias: float, streams: Sequence[StreamOutcome]) -> OperatingPoint:
    """The point of all streams at one bias. ValueError: they have no event or no length."""
    events = [event for stream in streams for event in stream.events]
    minutes = sum(stream.minutes for stream in streams)
    if not events or not minutes:
        raise ValueError("no events were watched")
    hits = [event.delay for event in events if event.delay is not None]
    matched, false = (
        sum(stream.matched for stream in streams),
        sum(stream.false for stream in streams),
    )
    recall = len(hits) / len(events)
    precision = matched / (matched + false) if matched + false else 1.0
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    words = sum(stream.spoken for stream in streams) / minutes
    delay = sum(hits) / len(hits) if hits else None
    return OperatingPoint(bias, len(events), recall, precision, f1, false / minutes, words, delay)


def best(points: Sequence[OperatingPoint]) -> OperatingPoint:
    """The point of the best F1; of several, the one with the fewest words."""
    return max(points, key=lambda point: (point.f1, -point.words))


def rows(points: Sequence[OperatingPoint], lost: Mapping[float, Sequence[Item]]) -> list[Row]:
    """A row of the table for each bias, and one for the best.

    lost: by bias, a record for each stream that was not watched: `failed`, `skipped`, or empty
    where it was not asked.
    """
    known = {point.bias: point for point in points}
    named = [(f"events, bias {bias:g}", bias) for bias in lost]
    if points:
        named.append(("events, best bias", best(points).bias))
    return [_row(name, known.get(bias), lost[bias]) for name, bias in named]


def _row(name: str, point: OperatingPoint | None, lost: Sequence[Item]) -> Row:
    row = mean_row(name, "F1", lost, len(lost))
    if point is None:
        return row
    of = point.events + len(lost)
    return replace(row, value=point.f1, count=point.events, of=of, settings=_settings(point))


def _settings(point: OperatingPoint) -> dict[str, float | str]:
    delay = "" if point.delay is None else round(point.delay, 3)
    return {
        "bias": point.bias, "recall": round(point.recall, 4),
        "precision": round(point.precision, 4),
        "false alarms a minute": round(point.false_alarms, 3),
        "words a minute": round(point.words, 2), "delay (s)": delay,
    }  # fmt: skip


def write_curve(points: Sequence[OperatingPoint], out: Path) -> None:
    """Writes curve.json and curve.svg."""
    data = {"points": [asdict(point) for point in points], "best_bias": best(points).bias}
    write_atomically(out / "curve.json", json.dumps(data, indent=1) + "\n")
    write_atomically(out / "curve.svg", _svg(points))


def _svg(points: Sequence[OperatingPoint]) -> str:
    from matplotlib.figure import Figure  # here: half a second

    ordered = sorted(points, key=lambda point: point.bias)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([p.false_alarms for p in ordered], [p.recall for p in ordered], "o-")
    for point in ordered:
        left.annotate(f"{point.bias:g}", (point.false_alarms, point.recall))
    left.set(xlabel="false alarms a minute", ylabel="events told in time", ylim=(-0.02, 1.05))
    left.set_title("Operating curve (numbers: silence bias)")
    biases = [point.bias for point in ordered]
    for name in ("f1", "recall", "precision"):
        right.plot(biases, [getattr(p, name) for p in ordered], "o-", label=name.replace("f", "F"))
    right.axvline(best(points).bias, color="grey", linestyle=":")
    right.set(xlabel="silence bias", ylim=(-0.02, 1.05))
    right.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
