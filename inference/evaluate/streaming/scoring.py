"""Scores the records of jobs: items with scores, rows of the table, totals of benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from inference.evaluate.results import EvaluationRun, Row, mean_row
from inference.evaluate.streaming.items import Judge, NoJudge, Point
from inference.evaluate.streaming.jobs import OFFICIAL, Job, JobRecords, replies_of, watched_of
from inference.evaluate.streaming.judge import JudgeFailed
from inference.evaluate.streaming.ovobench import GROUPS

NO_JUDGE = "no judge"
Line = dict[str, Any]  # an item of inference.evaluate.results


@dataclass(frozen=True)
class Scores:
    """The scored items of each row."""

    lines: dict[str, list[Line]]  # by row
    metrics: dict[str, str]  # by row
    of: dict[str, int]  # number of items that each row should have
    views: frozenset[str]  # rows that look at items of another one in another way
    failure: str  # of the judge; empty: none

    def rows(self, run: EvaluationRun) -> list[Row]:
        """Writes each row's items into its file; returns the rows of the table."""
        rows = []
        for name, lines in self.lines.items():
            run.replace(name, lines)
            view = name in self.views
            rows.append(mean_row(name, self.metrics[name], lines, self.of[name], view=view))
        return rows


def score(jobs: Sequence[Job], records: JobRecords, judge: Judge, threads: int) -> Scores:
    """Scores the jobs that have a record. Items whose judge fails are `failed`."""
    lines: dict[str, list[Line]] = defaultdict(list)
    metrics: dict[str, str] = {}
    of: dict[str, int] = defaultdict(int)
    failure = ""
    with ThreadPoolExecutor(threads, "moss-score") as pool:
        found = list(pool.map(partial(_lines, records=records, judge=judge), jobs))
    for job, points in zip(jobs, found, strict=True):
        row = named(job.item.row, job)
        metrics.setdefault(row, "accuracy")
        if points is None:  # not run yet
            lines[row] += []
            of[row] += 1
            continue
        for name, metric, line in points:
            lines[name].append(line)
            metrics[name] = metric or metrics.get(name, "accuracy")
            of[name] += 1
            if line.pop("judge", False):
                failure = failure or line["failed"]
    views = frozenset(lines) - {named(job.item.row, job) for job in jobs}
    return Scores(dict(lines), metrics, dict(of), views, failure)


def named(row: str, job: Job) -> str:
    """A row's name, with ` (push)` where the item has an official protocol, too."""
    return row if job.protocol == OFFICIAL or not job.benchmark.polls(job.item) else f"{row} (push)"


def _lines(job: Job, records: JobRecords, judge: Judge) -> list[tuple[str, str, Line]] | None:
    """(row, metric, line) for each point of a job; None: the job has no record."""
    record, item = records.record(job), job.item
    row = named(item.row, job)
    if record is None:
        return None
    base: Line = {"id": item.id, "row": row, "media": [str(item.video)]}
    if "skipped" in record or "failed" in record:
        names = ("skipped", "failed", "detail")
        kept: Line = {name: record[name] for name in names if name in record}
        return [(row, "", {**base, **kept})]
    try:
        if job.protocol == OFFICIAL:
            points = job.benchmark.official(item, replies_of(record), judge)
        else:
            points = job.benchmark.push(item, watched_of(record), judge)
    except NoJudge:
        return [(row, "", {**base, "skipped": NO_JUDGE})]
    except JudgeFailed as error:
        return [(row, "", {**base, "failed": str(error), "judge": True})]
    return [(named(p.row, job), p.metric, _line(p, base, named(p.row, job))) for p in points]


def _line(point: Point, base: Line, row: str) -> Line:
    line = {**base, "id": point.id, "row": row, "score": point.score}
    if point.metric == "accuracy":
        line["correct"] = point.score == 1.0
    return {
        **line, "question": point.question, "answer": point.answer, "reference": point.reference,
        "at": point.at,
    }  # fmt: skip


def totals(rows: Sequence[Row]) -> list[Row]:
    """Means that benchmarks report besides their tasks: OVO-Bench's groups and its total (means of
    their rows), StreamingBench's `real` and `omni` (means of their items)."""
    by_name = {row.row: row for row in rows}
    extra = []
    for end in ("", " (push)"):
        groups = []
        for group, tasks in GROUPS.items():
            parts = [by_name[n] for task in tasks if (n := f"ovobench {task}{end}") in by_name]
            if parts:
                groups.append(_mean(f"ovobench {group}{end}", parts, weighted=False))
        extra += groups
        if len(groups) == len(GROUPS):
            extra.append(_mean(f"ovobench{end}", groups, weighted=False))
        for part in ("real", "omni"):
            start = f"streamingbench {part}: "
            parts = [
                r
                for r in rows
                if r.row.startswith(start) and r.row.endswith(" (push)") == bool(end)
            ]
            if parts:
                extra.append(_mean(f"streamingbench {part}{end}", parts, weighted=True))
    return extra


def _mean(name: str, parts: Sequence[Row], weighted: bool) -> Row:
    weighted_values = [
        (part.value, part.count if weighted else 1) for part in parts if part.value is not None
    ]
    count = sum(weight for _, weight in weighted_values)
    value = sum(value * weight for value, weight in weighted_values) / count if count else None
    skipped: dict[str, int] = defaultdict(int)
    for part in parts:
        for why, number in part.skipped.items():
            skipped[why] += number
    return Row(
        name, parts[0].metric, value, sum(p.count for p in parts), sum(p.of for p in parts),
        sum(p.failed for p in parts), dict(skipped),
    )  # fmt: skip
