"""Scores the records of jobs: items with scores, rows of the table, totals of benchmarks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
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
            of[row] += points_of(job)
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


def points_of(job: Job) -> int:
    """The number of scores that come of a job in its item's row."""
    item = job.item
    if job.protocol == OFFICIAL or item.push_points is None:
        return item.points
    return item.push_points


def _lines(job: Job, records: JobRecords, judge: Judge) -> list[tuple[str, str, Line]] | None:
    """(row, metric, line) for each point of a job; None: the job has no record."""
    record, item = records.record(job), job.item
    row = named(item.row, job)
    if record is None:
        return None
    base: Line = {"id": item.id, "row": row, "media": [str(item.video)]}
    count = points_of(job)
    ids = [item.id] if count == 1 else [f"{item.id}.{number}" for number in range(count)]

    def without(reason: Line) -> list[tuple[str, str, Line]]:
        return [(row, "", {**base, "id": name, **reason}) for name in ids]

    if "skipped" in record or "failed" in record:
        names = ("skipped", "failed", "detail")
        return without({name: record[name] for name in names if name in record})
    try:
        if job.protocol == OFFICIAL:
            points = job.benchmark.official(item, replies_of(record), judge)
        else:
            points = job.benchmark.push(item, watched_of(record), judge)
    except NoJudge:
        return without({"skipped": NO_JUDGE})
    except JudgeFailed as error:
        return without({"failed": str(error), "judge": True})
    return [(named(p.row, job), p.metric, _line(p, base, named(p.row, job))) for p in points]


def _line(point: Point, base: Line, row: str) -> Line:
    line = {**base, "id": point.id, "row": row, "score": point.score}
    if point.metric == "accuracy":
        line["correct"] = point.score == 1.0
    return {
        **line, "question": point.question, "answer": point.answer, "reference": point.reference,
        "at": point.at,
    }  # fmt: skip


def totals(rows: Sequence[Row], known: Collection[str]) -> list[Row]:
    """Means that benchmarks report besides their tasks: OVO-Bench's groups and its total (means of
    their rows), StreamingBench's `real` and `omni` (means of their items).

    known: all rows of the files of questions. A mean of some of them only is left out.
    """
    by_name = {row.row: row for row in rows}
    extra = []
    for end in ("", " (push)"):
        groups = []
        for group, tasks in GROUPS.items():
            own = [name for task in tasks if (name := f"ovobench {task}") in known]
            groups += _mean_of(f"ovobench {group}{end}", own, end, by_name, weighted=False)
        extra += groups
        if len(groups) == len(GROUPS):
            extra.append(_mean(f"ovobench{end}", groups, weighted=False))
        for part in ("real", "omni"):
            own = [name for name in known if name.startswith(f"streamingbench {part}: ")]
            extra += _mean_of(f"streamingbench {part}{end}", own, end, by_name, weighted=True)
    return extra


def _mean_of(
    name: str, parts: Sequence[str], end: str, by_name: Mapping[str, Row], weighted: bool
) -> list[Row]:
    """The mean of the rows `parts`, whose names have this end; none where one of them is not
    there."""
    found = [by_name[f"{part}{end}"] for part in parts if f"{part}{end}" in by_name]
    return [_mean(name, found, weighted)] if found and len(found) == len(parts) else []


def _mean(name: str, parts: Sequence[Row], weighted: bool) -> Row:
    """A mean of rows; None where each row counts the same and one has no value."""
    weighted_values = [
        (part.value, part.count if weighted else 1) for part in parts if part.value is not None
    ]
    count = sum(weight for _, weight in weighted_values)
    value = sum(value * weight for value, weight in weighted_values) / count if count else None
    if not weighted and len(weighted_values) < len(parts):
        value = None
    skipped: dict[str, int] = defaultdict(int)
    for part in parts:
        for why, number in part.skipped.items():
            skipped[why] += number
    return Row(
        name, parts[0].metric, value, sum(p.count for p in parts), sum(p.of for p in parts),
        sum(p.failed for p in parts), dict(skipped),
    )  # fmt: skip
