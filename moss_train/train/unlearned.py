"""What of the data a run does not learn: samples skipped and cut, tokens cut away, masked turns;
and steps that learn nothing at all.

Each step's counts are in metrics.jsonl; here they are summed, and those over `LIMIT` are warned of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moss_train.log import log

LIMIT = 0.01  # share of the samples, labels or turns, above which there is a warning
ENOUGH = 100  # samples, before their share means anything
STILL = 10  # steps in a row whose gradient is 0: a batch of texts may have none for the projector

SUMMED = ("samples", "labels", "truncated_samples", "truncated_labels", "turns", "masked_turns")


def reasons(counts: Mapping[str, int]) -> str:
    """`no_labels 6, bad_json 1`: the most frequent first."""
    return ", ".join(f"{name} {count}" for name, count in Counter(counts).most_common())


@dataclass
class Totals:
    """Sums over steps. `sums`: of the fields `SUMMED`; `skipped`: samples by reason."""

    sums: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Totals:
        """Sums lines of metrics.jsonl; those of earlier versions lack some of the fields."""
        totals = cls()
        for row in rows:
            totals.add(row)
        return totals

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a step."""
        self.sums.update({name: row.get(name) or 0 for name in SUMMED})
        reasons = Counter(row.get("skipped_reasons") or {})
        unknown = (row.get("skipped_samples") or 0) - reasons.total()
        self.skipped += reasons + Counter({"unknown": unknown})

    def shares(self) -> dict[str, tuple[int, int]]:
        """What is not learned: how many, and of how many."""
        sums, skipped = self.sums, self.skipped.total()
        cut = sums["truncated_labels"]
        return {
            "samples skipped": (skipped, sums["samples"] + skipped),
            "samples cut": (sums["truncated_samples"], sums["samples"]),
            "labels cut away": (cut, sums["labels"] + cut),
            "turns masked": (sums["masked_turns"], sums["turns"]),
        }

    def warnings(self) -> dict[str, str]:
        """A line for each kind of loss that is over `LIMIT`."""
        shares = self.shares()
        high = {name for name, (part, whole) in shares.items() if part > LIMIT * whole}
        text = {name: _share(*pair) for name, pair in shares.items()}
        lines = {}
        if "samples skipped" in high:
            lines["skipped"] = (
                f"{text['samples skipped']} samples were skipped: {reasons(self.skipped)}"
            )
        if high & {"samples cut", "labels cut away"}:
            lines["cut"] = (
                f"{text['samples cut']} samples were longer than the sequence length and cut, with "
                f"{text['labels cut away']} labels: raise data.sequence_length"
            )
        if "turns masked" in high:
            lines["masked"] = (
                f"{text['turns masked']} of the assistant's turns have no loss, as the data say "
                "(learn: false)"
            )
        return lines

    def warn(self, warned: set[str], before: str = "") -> None:
        """Logs those of `warnings` whose kind is not in `warned`, and adds it there."""
        for kind, line in self.warnings().items():
            if kind not in warned:
                warned.add(kind)
                log.warning("%s%s", before, line)


class UnlearnedWarnings:
    """Warns once of each kind of loss, and of a gradient that stays 0, on the console."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], steps: int):
        """Goes on from the lines of metrics.jsonl of a run of so many steps."""
        self.totals, self.steps = Totals.of(rows), steps
        self._warned: set[str] = set()
        self._still = 0  # steps in a row without a gradient

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a step."""
        self._still = self._still + 1 if row.get("grad_norm") == 0 else 0
        if self._still == STILL and "still" not in self._warned:
            self._warned.add("still")
            log.warning(
                "step %d: the gradient has been 0 for %d steps: nothing is learned: look at what "
                "trains (stage.train), and at the losses before: a rate may have been too high",
                row["step"], STILL,
            )  # fmt: skip
        self.totals.add(row)
        if self.totals.sums["samples"] >= ENOUGH or row["step"] == self.steps:
            self.totals.warn(self._warned)


def lines(totals: Totals) -> Iterator[str]:
    """Lines for the table at the end of a run."""
    sums, skipped = totals.sums, totals.skipped.total()
    why = f": {reasons(totals.skipped)}" if skipped else ""
    yield (
        f"samples  {sums['samples']:,} ({skipped:,} skipped{why}; "
        f"{sums['truncated_samples']:,} cut)"
    )
    yield f"labels   {sums['labels']:,} ({sums['truncated_labels']:,} more cut away)"
    yield f"turns    {sums['turns']:,} of the assistant ({sums['masked_turns']:,} masked)"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole if whole else 0:.1%})"
