"""Writes the page of a synthesis: samples of each role, why others were rejected, examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipeline import files
from data_pipeline.atomic import write_atomically
from data_pipeline.page import render
from data_pipeline.schema import SampleError
from data_pipeline.synthesis.budget import Ledger
from data_pipeline.synthesis.config import CutConfig, SynthesisConfig
from data_pipeline.synthesis.cut import Source, clips
from data_pipeline.synthesis.outcomes import Finished
from data_pipeline.synthesis.write import Sample, WriteCounts

REPORT = "report.html"
_THUMB = 96  # pixels
_SECONDS = 60  # of an example that are shown


@dataclass(frozen=True)
class Second:
    """A second of an example: its picture (a `data:` URL), questions, answers and captions."""

    second: int
    picture: str
    asked: str
    said: str
    seen: str


@dataclass(frozen=True)
class Example:
    title: str
    why: str
    seconds: Sequence[Second]


def write_report(
    out: Path,
    found: Iterable[Sample],
    done: Finished,
    written: WriteCounts,
    usage: dict[str, tuple[int, int, int]],
    config: SynthesisConfig,
    examples: int,
) -> None:
    """Writes OUT/report.html, one file that needs no network."""
    ledger = Ledger(config.output, sum(u[1] for u in usage.values()),
                    sum(u[2] for u in usage.values()))  # fmt: skip
    counts = Counter[tuple[str, str]]()
    accepted: list[Example] = []
    rejected: list[Example] = []
    for sample in found:
        reason = sample.fault[0] if sample.fault else ""
        kind = (sample.candidate["role"] if not reason else "", reason)
        counts[kind] += 1
        if counts[kind] <= examples:
            (rejected if reason else accepted).append(_example(sample, config.cut.window))
    page = render(
        "synthesis.html.jinja",
        Path(__file__).parent,
        title=f"Synthesis: {out.name}",
        facts=_facts(done, written, ledger),
        roles=_roles(written, config),
        reasons=_reasons(written),
        usage=[[kind, *map(str, numbers)] for kind, numbers in usage.items()],
        accepted=accepted,
        rejected=rejected,
    )
    write_atomically(out / REPORT, page)


def _facts(done: Finished, written: WriteCounts, ledger: Ledger) -> list[str]:
    facts = [
        f"{done.videos} videos finished: {written.accepted.total()} samples, "
        f"{written.rejected.total()} rejected",
        f"{ledger.tokens_in} tokens of prompts, {ledger.tokens_out} of replies"
        + (f", cost {ledger.cost:.2f}" if ledger.cost else ""),
    ]
    facts += [f"noted, {note}: {count}" for note, count in sorted(written.notes.items())]
    facts += ["stopped at the budget"] if done.stopped else []
    return facts + [f"not finished: {path}: {why}" for path, why in islice(done.failed.items(), 20)]


def _roles(written: WriteCounts, config: SynthesisConfig) -> list[list[str]]:
    rejected = Counter[str]()
    for (role, _), count in written.rejected.items():
        rejected[role] += count
    rows = []
    for role in config.write.roles:
        accepted, refused = written.accepted[role], rejected[role]
        share = f"{accepted / (accepted + refused):.0%}" if accepted + refused else "-"
        rows.append([role, str(accepted), str(refused), share])
    return rows


def _reasons(written: WriteCounts) -> list[list[str]]:
    counts = Counter[str]()
    for (_, reason), count in written.rejected.items():
        counts[reason] += count
    return [[reason, str(count)] for reason, count in counts.most_common()]


def _example(sample: Sample, window: int) -> Example:
    candidate, clip = sample.candidate, sample.clip
    why = f"{sample.fault[0]}: {sample.fault[1]}" if sample.fault else candidate["role"]
    count = min(clip["end"] - clip["start"] + 1, _SECONDS)
    timeline = clip["timeline"] or {"scenes": [], "events": []}
    seen = [*(one for one in timeline["scenes"] if one["second"] % window == 0),
            *timeline["events"]]  # fmt: skip
    texts = {
        name: {second: " ".join(one["text"] for one in entries if one["second"] == second)
               for second in range(count)}
        for name, entries in (("asked", candidate["questions"]), ("said", candidate["answers"]),
                              ("seen", seen))
    }  # fmt: skip
    pictures = _pictures(sample.source, clip["start"], count) if candidate["role"] else []
    seconds = [
        Second(second, picture, texts["asked"][second], texts["said"][second],
               texts["seen"][second])
        for second, picture in enumerate(pictures)
    ]  # fmt: skip
    return Example(sample.key, why, seconds)


def _pictures(source: Source, start: int, count: int) -> list[str]:
    """Small pictures of a clip's seconds; none where the file is gone."""
    whole = CutConfig(clip=10**9, shortest=3, frame_side=_THUMB)
    try:
        (clip,) = clips(Source(source.path, source.name), files.read_bytes(source.path), whole, [])
    except SampleError:
        return []
    return list(clip.pictures[start - clip.start :][:count])
